"""Texts as training examples, and privacy units as slots of examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from torch import nn

from fedsynth.corpus import Corpus
from fedsynth.instructions import ASK, asked, record
from fedsynth.models.batches import given_rows, token_rows
from fedsynth.models.encoding import text_rows, token_ids
from fedsynth.models.form import LINES, Form, InTurns, InWords, Learns, learnt_rows, student_form
from fedsynth.models.loading import Kind, context_of, kind_of
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.task import NO_CARD, Task


@dataclass(frozen=True)
class Example:
    """One encoded text.

    Attributes:
        tokens: Token ids.
        start: Position of the first learnt token; the tokens before it (BOS, control code) are given. A seq2seq model
            reads the given tokens with its encoder, and its decoder learns the rest.
        cut: The text was too long: its rest and its end are missing.
        lost: Tokens of the text that are left out, be it cut or shortened to whole sentences.
    """

    tokens: tuple[int, ...]
    start: int
    cut: bool = False
    lost: int = field(default=0, compare=False)


class Encoded(Protocol):
    """An encoded text, with further fields that its loss may need."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids."""


Slot: TypeAlias = Sequence[Encoded]
"""The examples of one privacy unit, clipped together; none for an empty unit."""


def encode_slots(
    tokenizer: Any,
    corpus: Corpus,
    labels: Sequence[str],
    records: int,
    settings: GeneratorTraining,
    kind: Kind = "causal",
    *,
    task: Task = NO_CARD,
) -> list[tuple[Example, ...]]:
    """One slot per declared record, each a map of one privacy unit to itself (docs/privacy.md).

    If the corpus names persons, a unit is a person; its first rows with a text are used. A row with an unknown label
    or an unlisted value of an attribute, and a text that the tokenizer cannot read, are left out, and a slot beyond the
    real count is empty: no record of one unit changes another's slot, or whether there is an answer. Declare at least
    as many units as there are. Otherwise only the first `records` are used, and removing one of them would let the next
    one in (then the replace-one figure holds).

    Args:
        tokenizer: A public tokenizer.
        corpus: Private text; `prompts` are texts, `answers` class names. Without labels: instructions and responses.
        labels: The public label list; empty for instructions.
        records: The plan's declared number of units, for any real count.
        settings: Longest example, rows of a unit that count; for instructions, the part that the loss is on.
        kind: The generator's kind.
        task: The card, which gives each label's control code, or the form of instructions.

    Raises:
        ValueError: If the card has attributes and the corpus has none.
    """
    if labels and task.attributes and corpus.attributes is None:
        raise ValueError(f"the card has the attributes {', '.join(task.columns)}, this text has none")
    known, form = set(labels), LINES if labels else student_form(task, tokenizer)

    def encoded(row: int) -> Example | None:
        prompt, answer = corpus.prompts[row], corpus.answers[row]
        longest, text = settings.max_length, answer if not labels else prompt.strip()
        values = () if corpus.attributes is None else task.listed(corpus.attributes[row])

        def encode(text: str) -> Example | None:
            if not labels:
                return _record_or_none(tokenizer, (prompt, text), longest, kind, settings.loss_on, form)
            return _encode_or_none(tokenizer, task.code(answer, values or ()), text, longest, kind)

        if values is None or (labels and answer not in known):
            return None
        return _leading(encode, text) if settings.cut == "sentences" else encode(text)

    return [
        tuple(example for example in map(encoded, rows) if example is not None)
        for rows in unit_rows(corpus, records, settings.rows_per_unit)
    ]


def unit_rows(corpus: Corpus, records: int, rows_per_unit: int = 1) -> list[list[int]]:
    """The first rows with a text of each privacy unit, in the declared number of slots; one without a unit is empty.

    A row without a text holds its unit's place, but is not one of its rows.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(corpus.units if corpus.units is not None else range(len(corpus))):
        rows.setdefault(unit, []).extend([row] if corpus.prompts[row] else [])
    slots = [found[:rows_per_unit] for found in rows.values()][:records]
    return [*slots, *([] for _ in range(records - len(slots)))]


def encode_records(
    tokenizer: Any,
    corpus: Corpus,
    longest: int,
    kind: Kind = "causal",
    *,
    loss_on: Learns = "record",
    form: Form = LINES,
) -> list[Example]:
    """Instructions and responses as examples, without privacy units; texts that cannot be tokenized are left out."""
    pairs = ((prompt, answer) for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True) if prompt)
    found = (_record_or_none(tokenizer, pair, longest, kind, loss_on, form) for pair in pairs)
    return [example for example in found if example is not None]


def _record_or_none(
    tokenizer: Any, pair: tuple[str, str], longest: int, kind: Kind, learns: Learns, form: Form
) -> Example | None:
    """An instruction and its response in a model's form, or None if its tokenizer cannot read them."""
    prompt, answer = pair
    if not isinstance(form, InWords | InTurns):
        given = ASK if learns == "record" else asked(prompt)
        return _encode_or_none(tokenizer, given, record(prompt, answer).removeprefix(given).strip(), longest, kind)
    try:
        head, body, end = learnt_rows(tokenizer, form, (prompt, answer), learns, kind)
    except Exception:  # as in `_encode_or_none`
        return None
    return _within([*head, *body, end], len(head), longest)


def _encode_or_none(tokenizer: Any, given: str, text: str, longest: int, kind: Kind) -> Example | None:
    try:
        return encode_text(tokenizer, given, text, longest, kind)
    except Exception:  # the answer would reveal a record that makes it fail
        return None


def encode_text(tokenizer: Any, given: str, text: str, longest: int, kind: Kind) -> Example:
    """A text to learn, with its end, after the given part and its BOS.

    A text that is too long is cut, and has no end: a model would learn to stop in mid-sentence. The end of text occurs
    at the end only: line ends of the text and names of control tokens in it are text.
    """
    if kind == "seq2seq":
        [head] = token_rows(tokenizer, [given], kind)
    else:
        head = token_ids(tokenizer, given)
        head = head if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *head]
        text = f" {text}"
    return _within([*head, *token_ids(tokenizer, text), tokenizer.eos_token_id], len(head), longest)


def _within(tokens: Sequence[int], start: int, longest: int) -> Example:
    return Example(tuple(tokens[:longest]), start, cut=len(tokens) > longest, lost=max(0, len(tokens) - longest))


SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])\s*")


def _leading(encode: Callable[[str], Example | None], text: str) -> Example | None:
    """The leading whole sentences of a text that fit with their end; if not even one does, the text is cut.

    A sentence ends with a full stop, an exclamation or question mark, and a blank after it. An abbreviation may be
    taken for an end.
    """
    found = encode(text)
    if found is None or not found.cut:
        return found
    whole = len(found.tokens) + found.lost
    for match in SENTENCE_END.finditer(text):  # from the front: many short sentences are not read again and again
        more = encode(text[: match.start()])
        if more is None or more.cut:
            break
        found = replace(more, lost=whole - len(more.tokens))
    return found


def cut_texts(slots: Sequence[Sequence[Example]]) -> int:
    """Number of examples of these slots that were cut."""
    return sum(example.cut for slot in slots for example in slot)


def readable(tokenizer: Any, text: str) -> bool:
    """True if a tokenizer can read a text: the answer would reveal a record that makes it fail."""
    return bool(tokens_of(tokenizer, text))


def all_readable(tokenizer: Any, texts: Sequence[str]) -> list[bool]:
    """`readable` of each text, in one call unless the tokenizer fails at one of them."""
    try:
        return list(map(bool, text_rows(tokenizer, texts)))
    except Exception:  # one text, of many, that the tokenizer cannot read
        return [readable(tokenizer, text) for text in texts]


def tokens_of(tokenizer: Any, text: str) -> int | None:
    """Number of a text's tokens; None if the tokenizer cannot read it."""
    try:
        return len(token_ids(tokenizer, text))
    except Exception:  # each tokenizer raises its own
        return None


def check_room(tokenizer: Any, model: nn.Module, labels: Sequence[str], longest: int, task: Task = NO_CARD) -> None:
    """Checks before a charge that examples and samples of `longest` tokens fit.

    Raises:
        ValueError: If a control code leaves no room for a text, the model's context is too short, or the tokenizer has
            no end of text or tokens that the model does not know.
    """
    if labels:
        codes = {f"control code {code!r}": len(token_ids(tokenizer, code)) + 1 for code in task.codes(*labels)}
    elif (form := student_form(task, tokenizer)) == LINES:
        codes = {f"control code {ASK!r}": len(token_ids(tokenizer, ASK)) + 1}
    else:
        if isinstance(form, InTurns) and kind_of(model.config) != "causal":
            raise ValueError("a chat form needs a causal model: leave task.templates.student out")
        empty = given_rows(tokenizer, [form.unasked()], "causal")[0]
        codes = {"form of an instruction (task.templates.student)": len(empty)}
    code, tokens = max(codes.items(), key=lambda item: item[1])
    if tokens + 2 > longest:
        raise ValueError(f"the {code} has {tokens} tokens, which leaves no text of {longest}")
    context = context_of(model.config)
    if context is not None and longest > context:
        raise ValueError(
            f"{longest} tokens are asked for, the model's context holds {context}: use a smaller max_length"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): a text that never ends cannot be learnt")
    if len(tokenizer) > vocabulary_of(model):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary_of(model)}: "
            "save the model with the tokenizer that it was trained with"
        )


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that the model embeds: often more than its tokenizer writes."""
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]  # torch types it as Tensor | Module
    return embedding.num_embeddings
