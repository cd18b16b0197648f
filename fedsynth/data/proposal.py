"""What `fedsynth init` reads off a file, and the lengths that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsynth.corpus import same
from fedsynth.data.loaders import load_columns
from fedsynth.data.partition import ClientData, divide
from fedsynth.data.places import find
from fedsynth.data.tables import HELD, LABEL, TEXT, UNIT, Rows, read_rows
from fedsynth.models.at_hand import Models, counter
from fedsynth.rouge import words
from fedsynth.scenario.data import Data, TestRows
from fedsynth.scenario.task import MAX_WORDING, NO_CARD
from fedsynth.typed import BadValue, nearest

TEXTS = ("text", "note", "message", "document", "body", "content", "description", "abstract", "comment", "review",
         "sentence", "utterance", "question", "query", "narrative", "report")  # fmt: skip
LABELS = ("label", "class", "category", "intent", "topic", "target", "diagnosis", "department", "sentiment", "code")
INSTRUCTIONS = ("instruction", "question", "prompt", "input", "query", "text")
SPLITS = ("split", "set", "fold", "part", "partition", "subset")

# Of a client, at least, where the file reaches: a fifth is held out, and DP-SGD has some hundred to learn from.
UNITS = 120
MOST_CLIENTS = 8
FEWEST = 10  # units of a file; rows of a value that could name a client
MOST_SITES = 50  # values of a column that could be the clients
MOST_LABELS = 1000
SHARE = 0.95  # of the texts that a length must hold: the longest one is a fact about one person
SAMPLE = 5000  # texts that are measured, evenly over the file
CPU_TOKENS = 128  # of a text that a generator learns without a GPU, unless it is small: the time of a step goes with it
GPU_TOKENS = 1024
FILE = "from the file"
LIMIT = "a limit of the model or of this machine, not of the file"


@dataclass(frozen=True)
class Asked:
    """What a user says about a file; None for what is to be guessed or is not there.

    Attributes:
        file: As it was named.
        text: Column of the text or instruction.
        label: Column of the class name.
        response: Column of the response: the file holds instructions.
        person: Column of the person.
        site: Column whose values are the clients.
        test: The rows to hold out.
    """

    file: str
    text: str | None = None
    label: str | None = None
    response: str | None = None
    person: str | None = None
    site: str | None = None
    test: TestRows | None = None


@dataclass(frozen=True)
class Found:
    """What was read off a file.

    Attributes:
        data: The source, its columns, and its division among clients.
        labels: The class names, with their numbers of rows; empty for instructions.
        rows: Rows with a text and an answer.
        units: Persons, or rows.
        incomplete: Rows without one of the two.
        said: Lines on the columns: which were guessed, and why.
    """

    data: Data
    labels: dict[str, int]
    rows: int
    units: int
    incomplete: int
    said: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Declared figures: powers of two that hold 95 % of the texts.

    Attributes:
        generator: Tokens of a control code with a text, or of a record.
        task: Tokens of a text for the task model.
        answer: Tokens of a response; 0 without instructions.
        few_words: Words that 95 % of the texts have at least, rounded down.
        longer: Share of the texts that the generator's length does not hold: their leading sentences are learnt.
        cut: Share of the texts that the task model does not read to the end.
        said: How lengths were counted.
    """

    generator: int
    task: int
    answer: int
    few_words: int
    longer: float
    cut: float
    said: str

    @property
    def of_generator(self) -> str:
        """What the generator's length follows from."""
        return FILE if self.longer <= 1 - SHARE else LIMIT

    @property
    def of_task(self) -> str:
        """What the task model's length follows from."""
        return FILE if self.cut <= 1 - SHARE else LIMIT


# ---- The file ----


def read_file(asked: Asked) -> Found:
    """The columns, the labels and a division that leaves each client enough.

    Raises:
        BadValue: If the file or a column is missing, or no classifier could learn from it. No message holds a text.
    """
    frame = load_columns(find(asked.file))
    names = [str(name) for name in frame.columns]
    said: list[str] = []
    instructions = asked.response is not None
    text = _column(names, asked.text, "--text", INSTRUCTIONS if instructions else TEXTS, said)
    label = None if instructions else _column(names, asked.label, "--label", LABELS, said)
    for option, name in (("--response", asked.response), ("--person", asked.person), ("--site", asked.site)):
        if name is not None:
            _known(names, name, option)
    if label is not None:
        _check_label_column(frame[label], label)
    _check_text_column(frame[text], text)
    if asked.site is None:
        taken = {text, label, asked.response, asked.person, asked.test.column if asked.test else None}
        told = [name for name in names if name not in taken and _could_be_sites(frame[name])]
        said += [f"columns that could be the clients: {', '.join(map(repr, told))} (--site)"] if told else []
    test = asked.test or _split(frame, names, said)
    data = Data(
        asked.file,
        text=text,
        label=label or Data.label,
        response=asked.response or Data.response,
        task="instructions" if instructions else "classification",
        unit=asked.person,
        client_column=asked.site,
        split="natural" if asked.site else "iid",
        test=test,
        duplicates="drop",
    )
    rows = read_rows(data)
    labels = dict(Counter(rows.table[LABEL]).most_common()) if label is not None else {}
    if label is not None:
        _check_labels(sorted(labels), label, len(rows.table))
    units = int(rows.table[UNIT].nunique())
    if units < FEWEST:
        of = f"different values in {asked.person!r}" if asked.person else "rows with a text and an answer"
        raise BadValue(f"{asked.file}: {units} {of}: at least {FEWEST} are needed to train and to test on")
    return Found(
        _divided(data, rows, units), dict(sorted(labels.items())), len(rows.table), units, rows.incomplete, tuple(said)
    )


def _could_be_sites(values: Any) -> bool:
    """True for a column of some few names, each in several rows."""
    kinds = values.dropna().map(str).value_counts()
    return 2 <= len(kinds) <= MOST_SITES and int(kinds.iloc[-1]) >= FEWEST and not str(values.dtype).startswith("float")


def _column(names: Sequence[str], given: str | None, option: str, usual: Sequence[str], said: list[str]) -> str:
    if given is not None:
        return _known(names, given, option)
    plain = {same(name): name for name in names}
    for name in (*usual, *(f"{word}s" for word in usual)):
        if name in plain:
            said.append(f"{option} is not given: took the column {plain[name]!r} for its name")
            return plain[name]
    raise BadValue(f"say {option} COLUMN; the file has {', '.join(map(repr, names))}")


def _known(names: Sequence[str], given: str, option: str) -> str:
    if given not in names:
        raise BadValue(f"{option}: no column {given!r}; it has {', '.join(map(repr, names))}{nearest(given, names)}")
    return given


def _split(frame: Any, names: Sequence[str], said: list[str]) -> TestRows | None:
    """A column such as `split` with the value `test`."""
    for name in names:
        if same(name) in SPLITS and "test" in set(frame[name]):
            said.append(f"test rows: those with 'test' in the column {name!r}, which seems to say so")
            return TestRows(name, "test")
    return None


def _check_label_column(column: Any, name: str) -> None:
    """Refuses a column of no class names before a message could quote one of its values, which may be a text."""
    values = [str(value) for value in column if value is not None and same(str(value))]
    if not values:
        raise BadValue(f"the label column {name!r} is empty: name another one with --label")
    kinds = set(values)
    if len(kinds) > MOST_LABELS or (len(kinds) > 2 and 2 * len(kinds) > len(values)):
        raise BadValue(
            f"the label column {name!r} has {len(kinds)} different values in {len(values)} rows: it holds no class "
            "names; name another one with --label, or instructions with --response"
        )
    if (longest := max(map(len, kinds))) > MAX_WORDING:
        raise BadValue(
            f"the label column {name!r} holds a value of {longest} characters, a class name has {MAX_WORDING} at most"
        )


def _check_text_column(column: Any, name: str) -> None:
    """Refuses a column of a few values that many rows share: equal texts are dropped, and too few would be left."""
    values = [str(value) for value in column if value is not None and same(str(value))]
    if len(kinds := set(values)) < FEWEST <= len(values):
        raise BadValue(
            f"the text column {name!r} has {len(kinds)} different values in {len(values)} rows, of which equal ones "
            f"are dropped: at least {FEWEST} different texts are needed; name another column with --text"
        )


def _check_labels(labels: Sequence[str], name: str, rows: int) -> None:
    if len(labels) == 1:
        raise BadValue(
            f"all {rows} rows have the same label in {name!r}: a classifier needs two classes at least; name another "
            "column with --label"
        )


def _divided(data: Data, rows: Rows, units: int) -> Data:
    """The data with as many clients as leave each enough rows, and a listed label in training and test rows of each."""
    if data.client_column is not None:
        return _tried(replace(data, clients=max(1, rows.table["client"].nunique())))
    most = min(MOST_CLIENTS, max(2, units // UNITS))
    for clients in range(most, 1, -1):
        try:
            return _tried(replace(data, clients=clients))
        except BadValue:
            if clients == 2:
                raise
    raise AssertionError("there are two clients at least")


def _tried(data: Data) -> Data:
    for index, site in enumerate(divide(data, 0).sites):
        _check_site(data, index, site)
    return data


def _check_site(data: Data, index: int, site: ClientData) -> None:
    if min(len(site.train), len(site.test)) == 0:
        raise BadValue(f"{data.source}: client {index} would have no training or no test row: too few rows")


# ---- What follows ----


def lengths_of(found: Found, models: Models, *, gpu: bool) -> Lengths:
    """Lengths that the texts fit into, as far as the models' contexts and a CPU's patience reach.

    Args:
        found: The file.
        models: Their tokenizers count.
        gpu: A GPU is at hand.
    """
    rows = read_rows(found.data).table
    rows = rows[~rows[HELD]] if (~rows[HELD]).any() else rows
    rows = rows.iloc[:: max(1, len(rows) // SAMPLE)]
    texts, answers = rows[TEXT].tolist(), rows[LABEL].tolist()
    of_generator, said = counter(models.generator)
    of_task, _ = counter(models.task_model)
    if found.labels:
        code = max(of_generator(NO_CARD.code(label)) for label in found.labels) + 16  # a noun of the card's, too
        whole = [of_generator(text) + code for text in texts]
        own, answer = [of_task(text) + 2 for text in texts], 0
    else:
        whole = [
            of_generator(text) + of_generator(response) + 32 for text, response in zip(texts, answers, strict=True)
        ]
        own, answer = whole, _power(_share(map(of_generator, answers), SHARE))
    context = models.generator.context or GPU_TOKENS
    cap = context // 2 if models.generator.small else min(context // 2, GPU_TOKENS if gpu else CPU_TOKENS)
    generator = min(_power(_share(whole, SHARE)), cap)
    task = min(_power(_share(own, SHARE)), models.task_model.context or GPU_TOKENS)
    few = _share((len(words(text)) for text in texts), 1 - SHARE)
    return Lengths(
        generator,
        task,
        min(answer, generator),
        1 << max(0, min(few, 8).bit_length() - 1),
        _over(whole, generator),
        _over(own, task),
        said + (f" ({len(texts)} texts of the file)" if len(texts) < found.rows else ""),
    )


def _share(values: Any, share: float) -> int:
    ordered = sorted(values)
    return int(ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))])


def _over(values: Sequence[int], most: int) -> float:
    return sum(value > most for value in values) / len(values)


def _power(number: int) -> int:
    """The next power of two, 16 at least.

    >>> [_power(number) for number in (3, 16, 17, 250)]
    [16, 16, 32, 256]
    """
    return 1 << max(4, (number - 1).bit_length())
