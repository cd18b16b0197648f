"""The task card: labels in words, and the templates of what models are asked and learn."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import prod
from string import Formatter
from types import MappingProxyType
from typing import Literal

from fedsynth.corpus import LETTERS, alike, same, told_apart
from fedsynth.typed import BadValue

MAX_WORDING = 200  # characters: a control code stands before every private text
MAX_WORDS = 4000  # characters of a description, a domain, a template
MAX_ATTRIBUTES = 3
MAX_VALUES = 50  # of an attribute
MAX_CODES = 1000  # labels x combinations of values: each of them is asked for


@dataclass(frozen=True)
class LabelCard:
    """One label in words.

    Attributes:
        wording: A short phrase that can follow "about", as "activating a new card".
        description: A sentence or two: which texts have this label, and which do not.
    """

    wording: str
    description: str = ""

    def __post_init__(self) -> None:
        _in_one_line("wording", self.wording, MAX_WORDING)
        if self.description:
            _in_one_line("description", self.description, MAX_WORDS)


@dataclass(frozen=True)
class AttributeCard:
    """The public values of a further column, in words.

    Attributes:
        values: Value, as the column has it -> a short phrase that can follow the label's wording, as "five stars".
    """

    values: Mapping[str, str]


# Each template's slots: those that it must show, and all that it may. Attributes are further slots of `generator`.
_LABEL = frozenset(("label", "wording"))
SLOTS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "generator": (frozenset(), frozenset(("noun", "domain", "description")) | _LABEL),
    "writer": (frozenset(("examples",)), frozenset(("noun", "domain", "description", "style", "examples")) | _LABEL),
    "examples": (frozenset(("texts",)), frozenset(("noun", "domain", "texts")) | _LABEL),
    "student": (frozenset(("instruction",)), frozenset(("instruction", "domain", "style"))),
    "professional": (frozenset(("instruction",)), frozenset(("instruction", "domain", "style"))),
    "judge": (frozenset(("instruction", "verdict")), frozenset(("instruction", "verdict", "domain", "style"))),
    "choice": (frozenset(("text",)), frozenset(("text", "wordings", "noun", "domain"))),
    "options": (frozenset(("text", "options")), frozenset(("text", "options", "noun", "domain"))),
}
OPTIONAL = frozenset(("generator", "student", "professional"))  # empty: as tiny models learnt it
OF_LABELS = frozenset(("generator", "writer"))  # these must tell the label
ONCE = frozenset(("student", "professional"))  # what a model writes is parted at their instruction


def slots_of(name: str, template: str, needed: frozenset[str], allowed: frozenset[str]) -> list[str]:
    """The slots of a template, in their order.

    Args:
        name: Its key, for messages.
        template: Words with slots in braces.
        needed: The slots that it must have.
        allowed: All that it may have.

    Raises:
        BadValue: If it lacks a slot, has an unknown one, formats one, or is too long.
    """
    if len(template) > MAX_WORDS:
        raise BadValue(f"{name} has {len(template)} characters: {MAX_WORDS} at most")
    try:
        parts = [(slot, form, turned) for _, slot, form, turned in Formatter().parse(template) if slot is not None]
    except ValueError as problem:
        raise BadValue(f"{name}: {problem}; write {{{{ and }}}} for braces") from problem
    if formatted := [slot for slot, form, turned in parts if form or turned]:
        # A width of a billion would fill a site's memory.
        raise BadValue(f"{name}: the slot {{{formatted[0]}}} takes no format")
    slots = [slot for slot, _, _ in parts]
    if unknown := sorted(set(slots) - allowed):
        raise BadValue(
            f"{name} has the unknown slot {{{unknown[0]}}}: it may have "
            f"{', '.join(f'{{{slot}}}' for slot in sorted(allowed))}"
        )
    if missing := sorted(needed - set(slots)):
        raise BadValue(f"{name} lacks the slot {{{missing[0]}}}")
    return slots


JUDGE = """Below stands an instruction that another model wrote. Is it good enough to learn from?

Instruction: {instruction}

Keep it if all of this holds, and drop it otherwise:
1. It can be understood, and nothing of it is missing.
2. It belongs to your field.
3. You can respond to it correctly with what it says.
End with one line: "{verdict}" followed by keep or by drop.
"""


@dataclass(frozen=True)
class Templates:
    """How prompts are made of a card; each names its slots in braces.

    Attributes:
        generator: The control code before a text: what a client's generator learns a text after, and a base LLM reads.
            Left out: `{noun} about {wording}:`, and `{wording}:` where the card has no noun. It shows each attribute as
            the slot of its column's name, `{stars}`; left out, their wordings follow that of the label.
        writer: The question to an LLM that converses, for one text of a label. `{examples}` is empty where nothing
            is demonstrated, so that arms with and without demonstrations ask the same.
        examples: The block of demonstrations in it; `{texts}` has one on each line.
        student: Instructions: what stands before the response that a client's model learns, as `{instruction}`. Where
            the model has a chat template it is the user's turn, after the system prompt, and the response is the
            model's; else it is text, and must end in words after the instruction. Left out: the line
            `question: ... answer: ...`, for models that learnt it.
        professional: Instructions: what a professional model is asked for a response, likewise.
        judge: The question to a judge about an instruction. The answer ends with `{verdict}` and keep or drop.
        choice: The question about a `{text}` to which its label's wording is the answer, where `data.task = "choice"`;
            `{wordings}` lists all. Private texts are read in it: each of its words costs every step.
        options: A question (`{text}`) that brings its own options, where `data.options` names them. `{options}` has
            one on each line after its letter; the letter of the right one is the response.
    """

    generator: str = ""
    writer: str = (
        "{examples}Write {noun}. It is about {wording}. {description} {style}\nAnswer with the text alone, on one line."
    )
    examples: str = "These are examples, one on each line:\n{texts}\n\nDo not copy them. "
    student: str = ""
    professional: str = ""
    judge: str = JUDGE
    choice: str = "{text}\n\nWhich topic is this about? Answer with one of these: {wordings}."
    options: str = "{text}\n\n{options}\n\nAnswer with the letter of the right option."

    def __post_init__(self) -> None:
        for name in SLOTS:
            if name != "generator":  # the card checks it, with its attributes
                self.check(name)

    def check(self, name: str, attributes: Iterable[str] = ()) -> None:
        """Checks the slots of a template.

        Args:
            name: Its key.
            attributes: Further slots that it must have.

        Raises:
            BadValue: If they are not those that it must or may have.
        """
        template, (needed, allowed) = getattr(self, name), SLOTS[name]
        if not template and name in OPTIONAL:
            return
        slots = slots_of(f"task.templates.{name}", template, needed.union(attributes), allowed.union(attributes))
        if name in ONCE and slots.count("instruction") > 1:
            raise BadValue(f"task.templates.{name} has the slot {{instruction}} more than once")
        if name in OF_LABELS and not set(slots) & _LABEL:
            raise BadValue(f"task.templates.{name} lacks the label: write {{wording}}, or {{label}}")


@dataclass(frozen=True)
class Task:
    """The card of a scenario. Without one, labels stand for themselves, as tiny models learnt them.

    Attributes:
        domain: A sentence about the domain, as "Customers of a bank write to its chat support."
        noun: A name for one text, with its article, as "a message of a bank's customer".
        style: Sentences that say how texts are written, as "The customer writes in the first person."
        system: System prompt of an LLM that converses; "" for none.
        labels: Label -> how it is put into words; a label that is not listed is put into words by its name.
        attributes: Column of `data.attributes` -> its public values in words. A control code tells a label and a value
            of each. All combinations are asked for alike, and no generator learns a row with an unlisted value.
        templates: How prompts are made.
    """

    domain: str = ""
    noun: str = ""
    style: str = ""
    system: str = ""
    labels: Mapping[str, LabelCard] = field(default_factory=dict)
    attributes: Mapping[str, AttributeCard] = field(default_factory=dict)
    templates: Templates = field(default_factory=Templates)

    def __post_init__(self) -> None:
        for name in ("domain", "noun", "style", "system"):
            if value := getattr(self, name):
                _in_one_line(f"task.{name}", value, MAX_WORDS)
        wordings = [card.wording.casefold() for card in self.labels.values()]
        if twice := sorted({w for w in wordings if wordings.count(w) > 1}):
            raise BadValue(
                f"task.labels: two labels have the wording {twice[0]!r}; one could not be told from the other"
            )
        for column, card in self.attributes.items():
            _check_attribute(column, card)
        if len(self.attributes) > MAX_ATTRIBUTES:
            raise BadValue(f"task.attributes has {len(self.attributes)} columns: {MAX_ATTRIBUTES} at most")
        self.check_codes(1)
        self.templates.check("generator", self.attributes)

    def check_codes(self, labels: int) -> None:
        """Checks that there are few enough control codes.

        Args:
            labels: Number of labels.

        Raises:
            BadValue: If there are too many.
        """
        combinations = prod(len(card.values) for card in self.attributes.values())
        if self.attributes and labels * combinations > MAX_CODES:
            of = f"{labels} labels with " if labels > 1 else ""
            raise BadValue(
                f"task.attributes: {of}{combinations} combinations of values are {labels * combinations:,}, "
                f"{MAX_CODES:,} at most: list fewer values"
            )

    def wording(self, label: str) -> str:
        """The label as a phrase in a sentence.

        >>> Task().wording("lost_or_stolen_card")
        'lost or stolen card'
        """
        card = self.labels.get(label)
        return parted(label) if card is None else card.wording

    def description(self, label: str) -> str:
        """Which texts have the label; "" where the card does not say."""
        card = self.labels.get(label)
        return "" if card is None else card.description

    def in_words(self, label: str) -> str:
        """The label as a text that an embedder can compare: its wording, then its description.

        >>> Task().in_words("lost_card")
        'lost card'
        """
        said = self.description(label)
        return f"{self.wording(label)}. {said}" if said else self.wording(label)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of attributes by name: the order of all values, whatever the order of the card or of a table."""
        return tuple(sorted(self.attributes))

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """All combinations of the attributes' values in the card's order, the last column's in turn first. Without
        attributes there is one, of no values.

        >>> Task(attributes={"stars": AttributeCard({"1": "one star", "5": "five stars"})}).combinations
        [('1',), ('5',)]
        """
        return list(product(*(self.attributes[column].values for column in self.columns)))

    def listed(self, values: Sequence[str]) -> tuple[str, ...] | None:
        """A row's values as the card writes them; None if one of them is not listed. Spellings count as the same.

        >>> Task(attributes={"stars": AttributeCard({"1": "one star", "5": "five stars"})}).listed([" 5"])
        ('5',)

        Args:
            values: One for each of `columns`; "" where the row has none.
        """
        found = [known.get(same(value)) for known, value in zip(self._spellings, values, strict=True)]
        whole = tuple(value for value in found if value is not None)
        return whole if len(whole) == len(found) else None

    @cached_property
    def _spellings(self) -> list[dict[str, str]]:
        return [{same(value): value for value in self.attributes[column].values} for column in self.columns]

    def code(self, label: str, values: Sequence[str] = ()) -> str:
        """The control code of a label: what stands before a text that a generator learns (FDKT, step 1).

        >>> Task().code("billing")
        'billing:'
        >>> Task(noun="a note").code("lost_card")
        'a note about lost card:'

        Args:
            label: The label.
            values: Of the attributes, each as the card lists it. Left out where a card has attributes, the code is that
                of the label alone, which is for LLMs: no generator learns it, and no template of attributes fits it.
        """
        told = dict(zip(self.columns, values, strict=True)) if values else {}
        words = {column: self.attributes[column].values[value] for column, value in told.items()}
        if self.templates.generator and (words or not self.attributes):
            return self._filled(self.templates.generator, label, **words)
        own = self.labels[label].wording if label in self.labels else label
        of_label = self._filled("{noun} about {wording}", label) if self.noun else own
        return f"{', '.join([of_label, *words.values()])}:"

    def codes(self, *labels: str) -> list[str]:
        """The control codes that a generator learns: of each label those of all combinations of values.

        >>> Task(attributes={"stars": AttributeCard({"1": "one star", "5": "five stars"})}).codes("food", "music")
        ['food, one star:', 'food, five stars:', 'music, one star:', 'music, five stars:']
        """
        return [self.code(label, values) for label in labels for values in self.combinations]

    def crossed(self, labels: Sequence[str]) -> tuple[Task, dict[str, tuple[str, tuple[str, ...]]]]:
        """A card by which an LLM is asked for texts of labels with values of the attributes.

        >>> stars = AttributeCard({"1": "one star", "5": "five stars"})
        >>> card, names = Task(noun="a review", attributes={"stars": stars}).crossed(["food"])
        >>> names
        {'food 1': ('food', ('1',)), 'food 2': ('food', ('5',))}
        >>> card.wording("food 2")
        'food, five stars'

        Returns:
            The card, and its labels: name -> label and values. Every label comes with the first values, then with the
            next ones.
        """
        found, names = dict[str, LabelCard](), dict[str, tuple[str, tuple[str, ...]]]()
        for number, values in enumerate(self.combinations, 1):
            words = [self.attributes[column].values[value] for column, value in zip(self.columns, values, strict=True)]
            for label in labels:
                name = f"{label} {number}"
                names[name] = (label, values)
                found[name] = LabelCard(", ".join([self.wording(label), *words]), self.description(label))
        templates = replace(self.templates, generator="")
        return replace(self, labels=found, attributes={}, templates=templates), names

    def question(self, label: str, shown: Sequence[str] = ()) -> str:
        """The question to an LLM that converses, for one text of a label.

        Args:
            label: One of the public list.
            shown: Demonstrations, each of one line; none for the arm without.
        """
        block = self._filled(self.templates.examples, label, texts="\n".join(shown)) if shown else ""
        domain = f"{self.domain}\n" if self.domain and "{domain}" not in self.templates.writer else ""
        asked = domain + self._filled(self.templates.writer, label, examples=_HERE)
        lines = [line.rstrip() for line in re.sub(" {2,}", " ", asked).split("\n")]
        return "\n".join(lines).replace(_HERE, block)  # an empty description leaves two blanks

    def around(self, template: Literal["student", "professional"]) -> tuple[str, str]:
        """The words of a template before and after the instruction; nothing where the card has none.

        >>> Task(domain="Bakers ask.", templates=Templates(student="{domain} {instruction}\\nSay:")).around("student")
        ('Bakers ask. ', '\\nSay:')
        """
        words: str = getattr(self.templates, template)
        before, _, after = words.format(instruction=_HERE, domain=self.domain, style=self.style).partition(_HERE)
        return before, after

    def choice(self, text: str, labels: Sequence[str]) -> str:
        """The question which of some labels a text has.

        >>> Task().choice("My card is gone!", ["lost_card", "pin"])
        'My card is gone!\\n\\nWhich topic is this about? Answer with one of these: lost card, pin.'
        """
        slots = {"wordings": ", ".join(map(self.wording, labels)), "noun": self.noun or "a text", "domain": self.domain}
        return self.templates.choice.format(text=text.strip(), **slots)

    def lettered(self, text: str, options: Sequence[str]) -> str:
        """A question with its own options, one on each line after its letter.

        >>> Task(templates=Templates(options="{text}\\n{options}")).lettered("Which is a metal?", ["zinc", "wood"])
        'Which is a metal?\\nA. zinc\\nB. wood'
        """
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        slots = {"options": lines, "noun": self.noun or "a text", "domain": self.domain}
        return self.templates.options.format(text=text.strip(), **slots)

    def judged(self, instruction: str, verdict: str) -> str:
        """The question to a judge about one instruction; its answer ends with the word `verdict` and keep or drop."""
        slots = {"verdict": verdict, "domain": self.domain, "style": self.style}
        return self.templates.judge.format(instruction=instruction, **slots)

    def _filled(self, template: str, label: str, **more: str) -> str:
        slots = {
            "label": label,
            "wording": self.wording(label),
            "description": self.description(label),
            "noun": self.noun or "a text",
            "domain": self.domain,
            "style": self.style,
            **more,
        }
        return template.format(**slots)


def _check_attribute(column: str, card: AttributeCard) -> None:
    key = f"task.attributes.{column}"
    if not re.fullmatch(r"[^\W\d][\w -]*", column):
        raise BadValue(
            f"task.attributes: {column!r} must be a slot of a template: letters, digits, blanks, '_' and '-', a letter "
            "first; name the column so"
        )
    if column in SLOTS["generator"][1]:
        raise BadValue(f"task.attributes: {{{column}}} is a slot of its own in templates; give the column another name")
    if not 2 <= len(card.values) <= MAX_VALUES:
        raise BadValue(f"{key}.values must hold from 2 to {MAX_VALUES} values, got {len(card.values)}")
    for value, wording in card.values.items():
        _in_one_line(f"a value of {key}.values", value, MAX_WORDING)
        _in_one_line(f"{key}.values.{value}", wording, MAX_WORDING)
    if found := alike(card.values):
        raise BadValue(f"{key}.values holds a value in several spellings: {', '.join(map(told_apart, found))}")
    wordings = [wording.casefold() for wording in card.values.values()]
    if twice := sorted({w for w in wordings if wordings.count(w) > 1}):
        raise BadValue(f"{key}.values: two values have the wording {twice[0]!r}; one could not be told from the other")


NO_CARD = Task()
_HERE = "\0"  # stands where demonstrations will: they are not touched


def parted(label: str) -> str:
    """An identifier as words.

    >>> parted("cashWithdrawal-failed_twice")
    'cash withdrawal failed twice'
    """
    words = re.sub(r"(?<=[a-z])[A-Z]", lambda capital: f" {capital[0].lower()}", label)
    return " ".join(re.sub("[_-]", " ", words).split()) or label


def proposed(
    labels: Sequence[str],
    attributes: Mapping[str, Sequence[str]] = MappingProxyType({}),
    column: str = "",
) -> str:
    """A first card as TOML, to be improved by hand: each label, and each value of attributes, with its words parted.

    Args:
        labels: The class names.
        attributes: Column -> its values.
        column: Name of the labels' column: a number alone says nothing, "stars 5" does.

    >>> print(proposed(["pin_blocked"]))
    # Language models are told this. All of it is public: write nothing that you read in private text.
    [task]
    domain = ""   # a sentence about the domain
    noun = ""     # what one text is, with its article, as "a message of a customer"
    style = ""    # how texts are written
    <BLANKLINE>
    [task.labels]
    "pin_blocked" = { wording = "pin blocked", description = "" }
    <BLANKLINE>
    """
    noun = 'noun = ""     # what one text is, with its article, as "a message of a customer"\n'
    head = _HEAD.replace("style =", f"{noun}style =")
    lines = [head, "[task.labels]"]
    lines += [
        f'{_toml(label)} = {{ wording = {_toml(words)}, description = "" }}' for label, words in worded(labels, column)
    ]
    for column, values in attributes.items():
        lines += ["", f"[task.attributes.{_toml(column)}.values]"]
        lines += [f"{_toml(value)} = {_toml(f'{column} {parted(value)}')}" for value in values]
    return "".join(f"{line}\n" for line in lines)


def worded(labels: Sequence[str], column: str = "") -> list[tuple[str, str]]:
    """Each label with its words parted; where two would be put alike, both as they are.

    >>> worded(["pin_blocked", "a_b", "a-b"])
    [('pin_blocked', 'pin blocked'), ('a_b', 'a_b'), ('a-b', 'a-b')]
    >>> worded(["1", "5"], "stars")
    [('1', 'stars 1'), ('5', 'stars 5')]
    """
    first = {
        label: f"{parted(column)} {label}" if column and not any(map(str.isalpha, label)) else parted(label)
        for label in labels
    }
    taken = Counter(words.casefold() for words in first.values())
    return [(label, words if taken[words.casefold()] == 1 else label) for label, words in first.items()]


_HEAD = """# Language models are told this. All of it is public: write nothing that you read in private text.
[task]
domain = ""   # a sentence about the domain
style = ""    # how texts are written
"""


def proposed_for_instructions() -> str:
    """A first card for instructions as TOML, to be improved by hand: models that converse are asked in turns.

    >>> import tomllib
    >>> Templates(**tomllib.loads(proposed_for_instructions())["task"]["templates"]).student
    '{instruction}'
    """
    return f"""{_HEAD}system = ""   # how a model that converses is to behave

[task.templates]
student = "{{instruction}}"        # the clients' model; a base model needs words after it, as "\\nAnswer:"
professional = "{{instruction}}"   # the professional model
"""


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON's strings are TOML's


def _in_one_line(name: str, value: str, longest: int) -> None:
    if not same(value) or value != value.strip():
        raise BadValue(f"{name} must hold words, without blanks around them, got {value!r}")
    if value.splitlines() != [value]:
        raise BadValue(f"{name} must stand in one line, got {value!r}")
    if len(value) > longest:
        raise BadValue(f"{name} has {len(value)} characters: {longest} at most")
