"""A stand-in for a worker: it measures the seconds and memory of each kind of a client's work on dummy text.

`python -m fedsynth.forecast.profiling` reads one JSON object from standard input and writes one to standard output. Its
process has a worker's environment and imports, so that its costs are a worker's. It forks: as many of them measure side
by side as workers will run, as cores share memory and its bandwidth, and the imports are made once.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np

from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.choice import as_instructions
from fedsynth.data.partition import ClientData, class_list, divide, label_list, open_site
from fedsynth.instructions import record
from fedsynth.models.chat import Prompt
from fedsynth.models.encoding import token_ids
from fedsynth.models.loading import load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.scenario.client import Client
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import cells, from_toml, to_toml
from fedsynth.simulation.flower import KEEPING, LaunchFailed
from fedsynth.typed import build, plain

Kind = Literal[
    "plan", "step", "own_step", "scorer_step", "sample", "demonstrated", "rate", "choose", "respond", "fit", "read"
]
SEED = 0x0D127E87  # of dummy text; no run has it, as runs' seeds are small numbers
LONG_ENOUGH = 0.5  # seconds of a measurement; a longer one would be hardly better
WRITING = ("sample", "demonstrated", "respond")  # a text costs far less in a batch than alone
FEW = 8  # texts of the smallest batch that is measured


@dataclass(frozen=True)
class Unit:
    """A unit of work that costs a client the same each time.

    Attributes:
        kind: `plan`: the noise of a plan and its statement. `step`: a step of the generator's training, as requested.
            `own_step`: the same step alone and without a guarantee. `scorer_step`: a step of a scorer under DP-SGD.
            `sample`: a text after its control code. `demonstrated`: a text after demonstrations. `rate`: the likelihood
            of a record. `choose`: those of all responses to choose from. `respond`: a response to a test instruction.
            `fit`: a text that the task model learns once. `read`: a text that it classifies.
        arm: The arm with the settings.
        tokens: Longest text to write, in tokens; `choose`: number of responses.
        shots: Number of demonstrations.
        frozen_a: Only the factors B are trained.
        temperature: The sampling temperature.
        top_p: The nucleus of sampling.
    """

    kind: Kind
    arm: str
    tokens: int = 0
    shots: int = 0
    frozen_a: bool = False
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Cost:
    """The costs of a unit.

    Attributes:
        first: Further seconds of a process that does the unit for the first time.
        each: Seconds of one unit.
    """

    first: float
    each: float


@dataclass(frozen=True)
class Probed:
    """The measurements of the workers' stand-ins.

    Attributes:
        costs: By unit, the mean over stand-ins, in seconds of work.
        imported: Seconds of work until a stand-in has started and made its imports, the mean over all.
        waiting: Wall seconds for each second of a worker's work: 1 if nobody else uses the cores.
        memory: Peak bytes of the largest stand-in.
    """

    costs: Mapping[Unit, Cost]
    imported: float
    waiting: float
    memory: int


def busy() -> float:
    """CPU time of this process in seconds, which other users of the cores do not change; wall time on a GPU."""
    from fedsynth.models.devices import gpus  # brings torch

    return time.perf_counter() if gpus() else time.process_time()


def waiting(since: tuple[float, float] = (0.0, 0.0)) -> float:
    """Wall seconds for each second in which this thread works: 1 if nobody else uses the cores, or the kernel gives no
    statistics.

    Args:
        since: An earlier value of `scheduled`; None for the thread's start.
    """
    worked, waited = (now - then for now, then in zip(scheduled(), since, strict=True))
    return 1 + waited / worked if worked > 0 else 1.0


def scheduled() -> tuple[float, float]:
    """The seconds in which this thread has worked, and those in which it has waited for a core."""
    facts = Path("/proc/thread-self/schedstat")
    worked, waited = facts.read_text().split()[:2] if facts.is_file() else ("0", "0")
    return int(worked) / 1e9, int(waited) / 1e9


def peak_memory() -> int:
    """Peak bytes of this process. `ru_maxrss` would count its parent's memory at the start."""
    facts = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", facts.read_text(), re.MULTILINE) if facts.is_file() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_peak() -> None:
    """Lets `peak_memory` begin anew, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---- Dummy text ------------------------------------------------------------------------------------------------------


def typical_lengths(cell: Cell) -> tuple[int, ...]:
    """Deciles of the clients' text lengths in tokens of the generator: figures such as the data card's, no text.

    Empty for worlds: dummy text is drawn from them with another seed.
    """
    data = cell.scenario.data
    if data.world is not None:
        return ()
    tokenizer = load_tokenizer(cell.scenario.client.generator)
    found = [
        len(token_ids(tokenizer, text))
        for site in divide(data, cell.seed).sites
        for text in (site.train.prompts if data.task == "classification" else _whole(_read(cell, site).train))[:200]
    ]
    return tuple(int(x) for x in np.quantile(found, np.linspace(0.05, 0.95, 10)))


def _read(cell: Cell, site: ClientData) -> ClientData:
    data = cell.scenario.data
    return as_instructions(site, class_list(data), cell.scenario.task) if data.task == "choice" else site


def _whole(corpus: Corpus) -> tuple[str, ...]:
    return tuple(f"{prompt} {answer}" for prompt, answer in zip(corpus.prompts, corpus.answers, strict=True))


def dummy_site(cell: Cell, index: int, lengths: Sequence[int], *, train: int, test: int) -> ClientData:
    """Text like a client's that no client holds: from its world under another seed, or random words.

    Args:
        cell: Its scenario names data and generator.
        index: Number of the client.
        lengths: Deciles from `typical_lengths`.
        train: Number of training texts.
        test: Number of test texts.
    """
    data = cell.scenario.data
    if data.world is not None:
        drawn = open_site(replace(data, train_per_client=train, test_per_client=test), index, SEED + cell.seed)
        return ClientData(_public(drawn.train), _public(drawn.test))
    rng = np.random.default_rng([SEED, index])
    labels, tokenizer = label_list(data), load_tokenizer(cell.scenario.client.generator)
    words = _words(tokenizer)

    def text(tokens: int) -> str:
        drawn = " ".join(words[i] for i in rng.integers(len(words), size=max(1, tokens)))
        return str(tokenizer.decode(token_ids(tokenizer, drawn)[: max(1, tokens)])).strip()

    def corpus(rows: int) -> Corpus:
        sizes = [lengths[i % len(lengths)] for i in range(rows)]
        if not labels:  # half of a record is the response
            return Corpus(tuple(text(n // 2) for n in sizes), tuple(text(n - n // 2) for n in sizes), Provenance.PUBLIC)
        answers = tuple(labels[i % len(labels)] for i in range(rows))
        return Corpus(tuple(map(text, sizes)), answers, Provenance.PUBLIC)

    return ClientData(corpus(train), corpus(test))


def _public(corpus: Corpus) -> Corpus:
    """Text of a world under a seed that no run has; it is nobody's."""
    return Corpus(corpus.prompts, corpus.answers, Provenance.PUBLIC)


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token each, if there are any."""
    pieces = [tokenizer.decode([i]) for i in range(min(len(tokenizer), 20_000))]
    found = [p.strip() for p in pieces if p.strip().isalpha() and len(p.strip()) > 2]
    return found or ["word"]


# ---- In the stand-in's process ---------------------------------------------------------------------------------------


def measured(cell: Cell, unit: Unit, most: int, lengths: Sequence[int]) -> Cost:
    """The costs of a unit in this process.

    Args:
        cell: A cell of the unit's arm.
        unit: The unit to measure.
        most: Largest number that a run does at once.
        lengths: Deciles of the lengths of dummy text.
    """
    work, many = _work(cell, unit, lengths)
    most = max(1, min(most, many))
    cold = _seconds(work, 1)
    if unit.kind == "plan":  # cached: a second call would cost nothing
        return Cost(cold, 0.0)
    writes = unit.kind in WRITING
    count = min(FEW, most) if writes else 1
    took = _seconds(work, count)
    first, tried = max(0.0, cold - took), [(count, took)]
    while count < most and (took < LONG_ENOUGH or (writes and len(tried) < 2)):
        count = min(most, max(2 * count, int(1.5 * LONG_ENOUGH / max(took, 1e-6) * count)))
        took = _seconds(work, count)
        tried.append((count, took))
    together = cell.scenario.stack if unit.kind == "step" else 1  # clients that each make those steps
    return Cost(first, each_of(tried, most) if writes else took / count / together)


def each_of(tried: Sequence[tuple[int, float]], batch: int) -> float:
    """Seconds of an item in a whole batch, by a line through the last two samples.

    >>> each_of([(4, 2.0), (16, 5.0)], 48)  # 1 second, and .25 for each
    0.2708333333333333

    Args:
        tried: Items and seconds of each sample, in the order of their size.
        batch: Items of a whole batch.
    """
    (few, less), (many, more) = ([tried[0]] * 2 + list(tried))[-2:]
    slope = max(0.0, (more - less) / (many - few)) if many > few else more / many
    return (more + slope * max(0, batch - many)) / max(batch, many)


def _seconds(work: Callable[[int], object], count: int) -> float:
    begun = busy()
    work(count)
    return busy() - begun


def _work(cell: Cell, unit: Unit, lengths: Sequence[int]) -> tuple[Callable[[int], object], int]:
    """A function that does the real work `n` times at once, and the largest `n` of a call."""
    from fedsynth.clients.client_side import declared_records
    from fedsynth.clients.finetune import on_base  # these bring torch
    from fedsynth.models.form import student_form
    from fedsynth.models.llm import LocalLLM
    from fedsynth.privacy.statement import statement
    from fedsynth.synthesis.self_instruct import pairs

    client, labels = cell.scenario.client.of(0), label_list(cell.scenario.data)
    texts = dummy_site(cell, 0, lengths, train=256, test=256)

    if unit.kind == "plan":
        records = declared_records(cell, 0)

        def planned(_: int) -> None:
            plan = client.plan(records, cell.scenario.rounds)
            statement(plan, rows=(), simulated=True)

        return planned, 1
    if unit.kind in ("step", "own_step"):
        return _steps(cell, unit, texts), 32
    if unit.kind in ("fit", "read", "scorer_step"):
        return _classifying(client, labels, texts, unit)

    def writer(batch: int) -> LocalLLM:
        tokenizer, model = load_tokenizer(client.generator), on_base(_ClientSide(client), _start(client)).eval()  # type: ignore[arg-type]  # a stand-in
        return LocalLLM(model, tokenizer, batch_size=batch, workers=1)

    form = student_form(cell.scenario.task, load_tokenizer(client.generator))

    def written(prompts: Sequence[Prompt], batch: int) -> Callable[[int], object]:
        how = SamplingParams(temperature=unit.temperature, top_p=unit.top_p, max_new_tokens=unit.tokens)
        return lambda n: writer(batch).complete([prompts[i % len(prompts)] for i in range(n)], how, seed=0)

    if unit.kind == "sample":
        if lengths:  # a generator that has learnt them ends its texts where they end; this one has learnt nothing
            unit = replace(unit, tokens=min(unit.tokens, 1 + round(sum(lengths) / len(lengths))))
        return written(cell.scenario.task.codes(*labels) or [form.opening()], 256), 256
    if unit.kind == "respond":
        return written([form.asked(prompt) for prompt in texts.test.prompts], 128), 128
    if unit.kind == "demonstrated":
        tokenizer, longest = load_tokenizer(client.generator), client.generator_training.max_length
        shown = [pair for pair in pairs(texts.train) if len(token_ids(tokenizer, record(*pair))) <= longest]
        return written([form.opening(shown[: unit.shots])], 64), 64
    prompts, answers = [form.asked(p) for p in texts.train.prompts], list(map(form.reply, texts.train.answers))
    if unit.kind == "choose":
        known = list(dict.fromkeys(answers))
        chosen = [known[i % len(known)] for i in range(unit.tokens)]
        return lambda n: writer(64).score([p for p in prompts[:n] for _ in chosen], chosen * n), 64
    return lambda n: writer(64).score(prompts[:n], answers[:n]), 64


@dataclass(frozen=True)
class _ClientSide:
    """The part of a client that `on_base` needs."""

    config: Client


def _start(client: Client) -> Any:
    from fedsynth.models.adapters import new_adapter

    settings = client.generator_training
    return new_adapter(
        client.generator,
        rank=settings.rank,
        alpha=settings.alpha,
        seed=0,
        precision=settings.precision,
        targets=settings.lora_targets,
    )


def _steps(cell: Cell, unit: Unit, texts: ClientData) -> Callable[[int], object]:
    """Steps of the generator's training, for a whole stack of clients if these train in one pass."""
    from fedsynth.clients.batched_training import TrainRequest, TrainResult, Trains, together
    from fedsynth.clients.client_side import declared_records
    from fedsynth.models.hub import config_of
    from fedsynth.models.loading import kind_of
    from fedsynth.privacy.noise import GrantRandomness
    from fedsynth.synthesis.augmentation import turns
    from fedsynth.training.dp_training import Training, private, without_guarantee
    from fedsynth.training.examples import encode_slots

    client, labels, task = cell.scenario.client.of(0), label_list(cell.scenario.data), cell.scenario.task
    settings, records = client.generator_training, declared_records(cell, 0)
    dp = unit.kind == "step" and client.guarantee == "dp"
    stack = cell.scenario.stack if unit.kind == "step" else 1
    tokenizer, kind = load_tokenizer(client.generator), kind_of(config_of(client.generator))
    rows = replace(
        texts.train,
        prompts=tuple(texts.train.prompts[i % len(texts.train)] for i in range(records)),
        answers=tuple(texts.train.answers[i % len(texts.train)] for i in range(records)),
    )
    if task.attributes:
        rows = replace(rows, attributes=tuple(turns(task.combinations, records)))
    one_each = replace(settings, rows_per_unit=1)
    slots = encode_slots(tokenizer, rows, labels, records, one_each, kind, task=task)
    start, planned = _start(client), client.plan(records, cell.scenario.rounds) if dp else None

    def training() -> Training:
        if planned is None:
            return without_guarantee(slots, settings, 0)
        return private(slots, planned, GrantRandomness(bytes(32)))  # a public key: the text is nobody's

    def trains(count: int) -> Trains[TrainResult]:
        asked = replace(training(), steps=count)
        return (yield TrainRequest(client.generator, start, settings, asked, unit.frozen_a))

    return lambda n: together([trains(n) for _ in range(stack)])


def _classifying(
    client: Client, labels: Sequence[str], texts: ClientData, unit: Unit
) -> tuple[Callable[[int], object], int]:
    from fedsynth.models.devices import device
    from fedsynth.privacy.noise import GrantRandomness
    from fedsynth.training.classifier import (
        classify,
        fit_classifier,
        label_losses,
        label_slots,
        new_scorer,
        new_task_model,
    )
    from fedsynth.training.dp_training import private, train_generator

    task, tokenizer = client.task_training, load_tokenizer(client.task_model)
    if unit.kind == "scorer_step":
        settings = client.scorer_training
        planned = client.score_plan(len(texts.train))
        model: Any = new_scorer(
            client.task_model,
            len(labels),
            rank=settings.rank,
            alpha=settings.alpha,
            seed=0,
            targets=settings.lora_targets,
        )
        model = model.to(device())
        slots = label_slots(tokenizer, texts.train, labels, len(texts.train), settings.max_length, model.config)

        def steps(n: int) -> None:
            asked = replace(private(slots, planned, GrantRandomness(bytes(32))), steps=n)
            train_generator(model, asked, settings, pad=tokenizer.pad_token_id, losses=label_losses)

        return steps, 32
    whole: list[Any] = []

    def model_of() -> Any:
        if not whole:
            whole.append(new_task_model(client.task_model, len(labels), task.trains, 0).to(device()))
        return whole[0]

    if unit.kind == "read":
        return lambda n: classify(model_of(), tokenizer, _some(texts.test, n).prompts, task.max_length), 128

    def fit(n: int) -> None:
        fit_classifier(model_of(), tokenizer, _some(texts.train, n), labels, task, epochs=1, seed=0)

    return fit, 64 * task.batch


def _some(corpus: Corpus, rows: int) -> Corpus:
    return corpus.take(i % len(corpus) for i in range(rows))


def main() -> None:
    """Measures the units that standard input names."""
    import ray  # noqa: F401 - a worker has it in memory

    import fedsynth.clients.app  # noqa: F401 - likewise
    from fedsynth.models.devices import one_thread

    one_thread()
    imported = time.process_time()
    asked = json.load(sys.stdin)
    side_by_side = asked["processes"]
    with ProcessPoolExecutor(side_by_side, get_context("fork")) as pool:
        said = list(pool.map(_all_measured, [asked] * side_by_side))
    print(json.dumps([{**each, "imported": imported} for each in said]), flush=True)


def _all_measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    begun, scenario = scheduled(), from_toml(asked["scenario"])
    known = {cell.arm: cell for cell in reversed(cells(scenario))}
    found = []
    for item in asked["units"]:
        unit = build(Unit, item["unit"])
        found.append(plain(measured(known[unit.arm], unit, item["most"], asked["lengths"][unit.arm])))
    return {"costs": found, "waiting": waiting(begun), "memory": peak_memory()}


# ---- In the asking process -------------------------------------------------------------------------------------------


class ProbeFailed(LaunchFailed):
    """A stand-in ended without a result; the message is the end of its output."""


def probe(scenario: Any, units: Mapping[Unit, int], lengths: Mapping[str, Sequence[int]], processes: int) -> Probed:
    """Starts stand-ins that measure side by side, and awaits them.

    Args:
        scenario: The scenario with all arms that run.
        units: The units to measure, each with the largest number that a run does at once.
        lengths: By arm, deciles from `typical_lengths`.
        processes: Number of stand-ins.

    Raises:
        ProbeFailed: If one of them ends early.
    """
    asked = json.dumps(
        {
            "scenario": to_toml(scenario),
            "units": [{"unit": plain(unit), "most": most} for unit, most in units.items()],
            "lengths": {arm: list(each) for arm, each in lengths.items()},
            "processes": processes,
        }
    )
    standing = subprocess.run(
        [sys.executable, "-P", "-m", "fedsynth.forecast.profiling"],
        input=asked,
        capture_output=True,
        env={**KEEPING, **os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=False,
    )
    if not standing.stdout.strip():
        last = (standing.stderr.strip().splitlines() or ["no word"])[-1]
        raise ProbeFailed(f"what stands in for a worker ended early: {last}")
    answers = json.loads(standing.stdout.splitlines()[-1])
    costs = {
        unit: Cost(*(mean(answer["costs"][place][name] for answer in answers) for name in ("first", "each")))
        for place, unit in enumerate(units)
    }
    imported, waited = (mean(answer[name] for answer in answers) for name in ("imported", "waiting"))
    return Probed(costs, imported, waited, max(answer["memory"] for answer in answers))


if __name__ == "__main__":
    main()
