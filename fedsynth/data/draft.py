"""The scenario that `fedsynth init` writes for a file: TOML with its reasons, and what was chosen in words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fedsynth.data.proposal import FILE, MOST_CLIENTS, SHARE, UNITS, Found, Lengths
from fedsynth.data.tables import NAMED
from fedsynth.models.at_hand import Models
from fedsynth.models.of_scenario import STRANGERS
from fedsynth.scenario.task import proposed, proposed_for_instructions

ENDPOINT_CONTEXT = 4096  # where an endpoint does not say

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
