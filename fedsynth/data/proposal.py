"""A first scenario for a file: what is read off it, what follows from that, and the TOML with its reasons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsynth.corpus import same
from fedsynth.data.loaders import load_columns
from fedsynth.data.partition import ClientData, divide
from fedsynth.data.places import find
from fedsynth.data.tables import HELD, LABEL, NAMED, TEXT, UNIT, Rows, read_rows
from fedsynth.models.at_hand import Models, counter
from fedsynth.models.of_scenario import STRANGERS
from fedsynth.rouge import words
from fedsynth.scenario.data import Data, TestRows
from fedsynth.scenario.task import MAX_WORDING, NO_CARD, proposed, proposed_for_instructions
from fedsynth.typed import BadValue, nearest

TEXTS = ("text", "note", "message", "document", "body", "content", "description", "abstract", "comment", "review",
         "sentence", "utterance", "question", "query", "narrative", "report")  # fmt: skip
LABELS = ("label", "class", "category", "intent", "topic", "target", "diagnosis", "department", "sentiment", "code")
INSTRUCTIONS = ("instruction", "question", "prompt", "input", "query", "text")
SPLITS = ("split", "set", "fold", "part", "partition", "subset")

UNITS = (
    120  # of a client, at least, where the file reaches: a fifth is held out, and DP-SGD has some hundred to learn from
)
MOST_CLIENTS = 8
FEWEST = 10  # units of a file; rows of a value that could name a client
MOST_SITES = 50  # values of a column that could be the clients
MOST_LABELS = 1000
SHARE = 0.95  # of the texts that a length must hold: the longest one is a fact about one person
SAMPLE = 5000  # texts that are measured, evenly over the file
CPU_TOKENS = 128  # of a text that a generator learns without a GPU, unless it is small: the time of a step goes with it
GPU_TOKENS = 1024
ENDPOINT_CONTEXT = 4096  # where an endpoint does not say


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


# ---- The scenario ----

HEAD = """# Written by `{command}`; every key: docs/scenario.md.
# Lines with "from the file" hold what was read off it. They become public when you send this scenario: the server,
# its LLM and every site read them, and epsilon does not cover them. Such lengths hold 95 % of the texts and are rounded
# up to powers of two.
name = {name}
seeds = [0]               # more of them give a spread: [0, 1, 2]
run = {run}"""
QUICK = """[quick]                   # a first look at the steps: its few, short texts say nothing of a method's worth
run = {run}
data.clients = 2
data.limit = {limit}           # so many rows or persons of each client
data.test_limit = 40
{more}"""
QUICK_UNITS, QUICK_TOKENS = 60, 64
LOCAL = 'strategy.use = "fedsynth.strategies.local:LocalOnly"'
KEPT = 'strategy.use = "fedsynth.strategies.label_names:LabelNames"'
FILE = "from the file"
LIMIT = "a limit of the model or of this machine, not of the file"


@dataclass(frozen=True)
class _Parts:
    """The tables that depend on the task.

    Attributes:
        strategy: Lines of [strategy].
        client: Of [client] and the tables in it.
        arms: Arm -> what it is, and its lines.
        quick: Arms of a first look.
        small: Lines of [quick].
        card: The table [task].
    """

    strategy: list[str]
    client: list[str]
    arms: dict[str, tuple[str, ...]]
    quick: tuple[str, ...]
    small: list[str]
    card: str


def write(found: Found, lengths: Lengths, models: Models, llm: str, *, name: str, source: str, command: str) -> str:
    """The scenario as TOML with its reasons.

    Args:
        found: The file.
        lengths: The declared lengths.
        models: The models; `llm` describes the server's.
        llm: The server's LLM as TOML.
        name: Of the scenario.
        source: The file as the scenario names it.
        command: The command that wrote it, for the first line.
    """
    parts = (_classification if found.labels else _instructions)(found, lengths, models)
    embedder = models.embedder or (models.generator if llm.startswith("{") else None)  # an endpoint embeds no text
    tables = [
        [HEAD.format(command=command, name=_toml(name), run=_toml(list(parts.arms)))],
        ["[strategy]", *parts.strategy],
        ["[data]", f"source = {_toml(source)}", *_data(found)],
        ["[client]", *parts.client],
        ["[server]", f"llm = {llm}", *([f"embedder = {_toml(embedder.name)}"] if embedder else [])],
        [QUICK.format(run=_toml(list(parts.quick)), limit=QUICK_UNITS, more="\n".join(parts.small))],
        *([_line(f"[arms.{arm}]", what), *lines] for arm, (what, *lines) in parts.arms.items()),
        [parts.card],
    ]
    return "\n\n".join("\n".join(table).rstrip() for table in tables) + "\n"


def _line(setting: str, *why: str) -> str:
    return f"{setting:<25} # {'; '.join(why)}" if any(why) else setting


def _classification(found: Found, lengths: Lengths, models: Models) -> _Parts:
    small, labels = models.generator.small, len(found.labels)
    texts = max(labels, min(20 * labels, 400) if small else min(12 * labels, 240))
    context = models.llm.context or ENDPOINT_CONTEXT
    shots = max(1, min(4, context // (4 * lengths.generator)))
    per_label = 10 if small else max(2, min(8, 96 // labels))
    strategy = [
        'use = "fedsynth.strategies.fdkt:FDKT"',
        _line(f"min_words = {lengths.few_words}", "shorter synthetic texts are dropped", FILE),
        _line(f"per_label = {per_label}", "DP drafts of each label and client"),
        _line(f"draft_tokens = {lengths.generator}", lengths.of_generator),
        _line(f"shots = {shots}", "drafts that the LLM reads in one prompt"),
        _line(f"num_texts = {texts}", "that the LLM writes"),
        _line(f"max_new_tokens = {min(lengths.generator, context // 4)}", "of each text of the LLM"),
        _line("one_to_many = true", "it writes once, for all clients, after all clients' drafts"),
    ]
    if models.embedder is not None:
        strategy += [
            'judge = "none"',
            _line('label_check = "embedder"', "texts that lie nearer to another label's words are dropped"),
        ]
    elif models.llm.kind == "unknown":
        strategy.append(_line('judge = "none"', "the likelihood judge needs an LLM that scores given texts"))
    card = proposed(list(found.labels), column=found.data.label)
    return _Parts(
        strategy,
        _client(found, lengths, models),
        _arms(found, models),
        ("majority", "local", "fdkt"),
        [
            f"strategy.num_texts = {max(labels, min(texts, 4 * labels))}",
            f"strategy.per_label = {min(4, per_label)}",
            f"strategy.min_words = {min(lengths.few_words, 8)}",
            f"strategy.draft_tokens = {min(lengths.generator, QUICK_TOKENS)}",
            f"strategy.max_new_tokens = {min(lengths.generator, context // 4, QUICK_TOKENS)}",
            f"client.task_training.max_length = {min(lengths.task, 2 * QUICK_TOKENS)}",
            *_quick_client(found, lengths, steps=20 if small else 4),
        ],
        card.replace("[task.labels]", _line("[task.labels]", FILE)),
    )


def _quick_client(found: Found, lengths: Lengths, *, steps: int) -> list[str]:
    each = min(QUICK_UNITS, max(1, found.units // 2))
    return [
        f"client.generator_training.steps = {steps}",
        f"client.generator_training.max_length = {min(lengths.generator, QUICK_TOKENS)}",
        f"client.generator_training.expected_batch_size = {max(1, min(16, each // 4))}",
    ]


def _arms(found: Found, models: Models) -> dict[str, tuple[str, ...]]:
    trains = "client.task_training.trains"
    arms: dict[str, tuple[str, ...]] = {
        "majority": ("the commonest label: what must be beaten", LOCAL, f'{trains} = "majority"')
    }
    if not _numbers(found):
        if models.task_model.kind == "encoder":
            arms["zero_shot"] = ("the label whose words are nearest", LOCAL, f'{trains} = "zero_shot"')
        arms["label_names"] = ("labels in words are all that is sent", KEPT)
    return arms | {
        "local": ("private text alone", LOCAL),
        "no_demonstrations": ("the LLM writes from labels alone", 'strategy.demonstrations = "none"'),
        "dp_only": ("the DP drafts, without the LLM", 'strategy.texts = "drafts"'),
        "fdkt": ("the method",),
    }


def _numbers(found: Found) -> bool:
    return not any(char.isalpha() for label in found.labels for char in label)


def _instructions(found: Found, lengths: Lengths, models: Models) -> _Parts:
    small = models.generator.small
    tuning = f"{{ epochs = 2, batch = 8, learning_rate = 1e-3, max_length = {lengths.generator} }}"
    strategy = [
        'use = "fedsynth.strategies.knowledge_sg:KnowledgeSG"',
        _line(f"num_texts = {200 if small else 32}", "records that each client's DP model writes"),
        _line(f"max_new_tokens = {lengths.generator}", lengths.of_generator),
        *(['judge = "instruction"'] if models.llm.chats or models.llm.kind == "unknown" else []),
        _line(f"pairs = {120 if small else 16}", "instructions that the LLM responds to"),
        _line(f"response_tokens = {lengths.answer}", FILE),
        _line(f"tuning = {tuning}", lengths.of_generator),
    ]
    card = proposed_for_instructions()
    if models.generator.name.startswith("assets:"):  # it ends each text with its line, and knows no other form
        card = card.partition("[task.templates]")[0]
    on_response = 'client.generator_training.loss_on = "response"'
    arms: dict[str, tuple[str, ...]] = {
        "base": ("the clients' model as it is", 'strategy.adopts = "nothing"'),
        "local": ("private records alone", LOCAL, on_response),
        "dp_only": ("each client's DP adapter, as it is", 'strategy.adopts = "dp"', on_response),
        "knowledge_sg": ("the method",),
    }
    return _Parts(
        strategy,
        _client(found, lengths, models),
        arms,
        ("base", "knowledge_sg"),
        _quick_client(found, lengths, steps=4),
        card,
    )


def _client(found: Found, lengths: Lengths, models: Models) -> list[str]:
    small, data = models.generator.small, found.data
    smallest = max(1, int(0.8 * found.units / data.clients))
    batch = 1 << max(1, min(16, smallest // 4).bit_length() - 1)
    own = f"task_model = {_toml(models.task_model.name)}"
    lines = [
        f"generator = {_toml(models.generator.name)}",
        own if found.labels else _line(f"answer_tokens = {lengths.answer}", FILE),
        _line("budget = { epsilon = 8.0, delta = 1e-5 }", f"for each {'person' if data.unit else 'row'}"),
        "",
        _line("[client.generator_training]", "DP-SGD"),
        f"expected_batch_size = {batch}",
        f"steps = {40 if small else 20}",
        *([] if small else ["learning_rate = 1e-2"]),
        _line(f"max_length = {lengths.generator}", "tokens, with the words before the text", lengths.of_generator),
        _line('cut = "sentences"', "of a longer text the leading whole ones are learnt: a generator learns to end"),
        _line(f"max_physical_batch_size = {16 if small else 4}", "more is faster and takes more memory"),
    ]
    if data.unit:
        lines.append(_line("rows_per_unit = 1", "so many rows of each person are learnt"))
    if not found.labels:
        return lines
    if not small:
        lines.append(
            _line("warm_start = { epochs = 2, batch = 4, learning_rate = 2e-3 }", "from the LLM's public texts")
        )
    lines += [
        "",
        "[client.task_training]",
        _line(f"max_length = {lengths.task}", "tokens; a longer text is cut", lengths.of_task),
    ]
    if models.task_model.small:
        return lines
    return [
        *lines,
        _line('trains = "head"', "the rest of the model stays as it is"),
        'schedule = "mixed"',
        "augmented_epochs = 10",
        "private_epochs = 30",
    ]


def _data(found: Found) -> list[str]:
    data, answers = found.data, ['task = "instructions"', f"response = {_toml(found.data.response)}"]
    if found.labels:
        labels = list(found.labels)
        listed = "[\n" + "".join(f"    {_toml(each)},\n" for each in labels) + "]"
        listed = _toml(labels) if len(_toml(labels)) < 90 else listed
        answers = [f"label = {_toml(data.label)}", _line(f"labels = {listed}", FILE)]
    if data.client_column is None:
        split = [_line('split = "iid"', 'rows are dealt by chance; "dirichlet": with unlike shares of each label')]
    else:
        split = ['split = "natural"', f"client_column = {_toml(data.client_column)}"]
    by_person = _line('# unit = "COLUMN"', "the column of persons; without it each row counts as one")
    if data.unit is not None:
        by_person = _line(f"unit = {_toml(data.unit)}", "privacy is per person")
    held = _line('# test = { column = "split", equals = "test" }', "left out: a fifth of each client's rows")
    if data.test is not None:
        held = f"test = {{ column = {_toml(data.test.column)}, equals = {_toml(data.test.equals)} }}"
    return [
        f"text = {_toml(data.text)}",
        *answers,
        _line(f"clients = {data.clients}", FILE),
        *split,
        by_person,
        held,
        _line('duplicates = "drop"', "of equal texts one is kept"),
    ]


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON's strings and lists are TOML's


# ---- What is told ----


def told(found: Found, lengths: Lengths, models: Models, *, gpu: bool) -> list[str]:
    """What was chosen and why, one line each; no text of the file is among them."""
    data, classes = found.data, bool(found.labels)
    unit = f"persons (column {data.unit!r})" if data.unit else "rows"
    left = f"; {found.incomplete} more lack one of the two and are left out" if found.incomplete else ""
    answer = data.label if classes else data.response
    lines = [*found.said, f"rows: {found.rows} with a text in {data.text!r} and an answer in {answer!r}{left}"]
    if classes:
        named = ", ".join(f"{label!r} {count}" for label, count in list(found.labels.items())[:NAMED])
        lines.append(f"labels: {len(found.labels)} ({named}{', ...' if len(found.labels) > NAMED else ''})")
        if _numbers(found):
            lines.append("labels are numbers, which tell a model nothing: put them into words in [task.labels]")
    how = f"about {found.units // data.clients} {unit} each, dealt by chance"
    lines.append(f"clients: {data.clients}, {how if data.client_column is None else f'by {data.client_column!r}'}")
    if data.unit and data.client_column is None and data.clients < min(MOST_CLIENTS, max(2, found.rows // UNITS)):
        lines.append(
            f"fewer clients than {found.rows} rows without --person would make: a person's rows stay together at one "
            f"client, and a client should have at least {UNITS} persons"
        )
    if data.unit is None:
        lines.append("privacy: per row; if a person has several rows, name the column of persons with --person")
    else:
        lines.append(
            f"privacy: per person; the generator learns one row of each ({found.units} persons, {found.rows} rows)"
        )
    if data.test is None:
        lines.append(f"test: a fifth of each client's {unit}")
    of_task = f", task model {models.task_model.name}" if classes else ""
    lines.append(f"models: generator {models.generator.name}{of_task}, LLM {models.llm.name}")
    if models.generator.name.startswith("assets:"):
        lines.append(f"{STRANGERS}; name models that do with --generator, --task-model and --llm (docs/real-models.md)")
    second = f"{lengths.task} for the task model" if classes else f"{lengths.answer} for a response"
    lines.append(f"lengths: {lengths.generator} tokens for the generator, {second}, counted {lengths.said}")
    if lengths.longer > 1 - SHARE:
        limit = "that its context holds" if models.generator.small or gpu else "that a CPU learns in good time"
        lines.append(
            f"{lengths.longer:.0%} of the texts are longer than the {lengths.generator} tokens {limit}: generators "
            "learn their leading sentences"
        )
    if classes and lengths.cut > 1 - SHARE:
        lines.append(
            f"{lengths.cut:.0%} of the texts are longer than the {lengths.task} tokens that the task model reads, and "
            "are cut: name one that reads more, or whose tokenizer knows the language (--task-model)"
        )
    return lines


def public(found: Found, lengths: Lengths) -> str:
    """What becomes public with the scenario, in a few words; a length that is a model's limit tells nothing of it."""
    clients = f"{found.data.clients} clients"
    of_generator = [str(lengths.generator)] if lengths.of_generator == FILE else []
    second = [str(lengths.answer)] if not found.labels else [str(lengths.task)] if lengths.of_task == FILE else []
    known = [*of_generator, *second]
    tokens = [f"lengths of {' and '.join(known)} tokens"] if known else []
    if not found.labels:
        return ", ".join([*tokens, clients])
    return ", ".join([f"{len(found.labels)} labels", *tokens, f"at least {lengths.few_words} words", clients])
