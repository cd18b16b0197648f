"""What a model and the texts of a method give away of private text, with real models: the figures beside epsilon.

    python simulations/benchmarks/memorisation.py --out FOLDER [--only NAME ...]

Each case plants canaries among a client's real rows and runs the client's own code: `clients.synthesize`, `finetune`,
`self_train` or `vote`, with ledger, plan and self-check. A canary is the text of a real row that nobody holds, and two
rare words at its end (Meeus et al. 2025). It stands in 1, 4 or 16 rows of ONE privacy unit, so that the stated epsilon
covers all of them; further canaries are in no row. Two adversaries: one has the trained model, one sees only the texts.

Of the model: exposure of each canary's words among random ones (Carlini et al. 2019), extraction by greedy and by
sampled continuations of its text, and the loss of members against held-out rows of the same source, alone and less the
base model's. Of the texts: those that hold a canary's words (its echo), near copies of private rows beside near copies
of held-out rows (so that common phrases do not count), and members against held-out rows by the nearest text.

Each case writes FOLDER/NAME.json; a rerun skips it. Simulations only: a held-out row and a planted one take no place
among the records of persons.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fedsynth.clients import self_train as fedpit
from fedsynth.clients.batched_training import TrainResult, together
from fedsynth.clients.client_side import ClientSide, simulated_client
from fedsynth.clients.finetune import finetune, on_base, slots_of
from fedsynth.clients.synthesize import synthesize
from fedsynth.clients.vote import ballots, prepared, summed, vote
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data.partition import ClientData, label_list, open_sites
from fedsynth.evaluation.attack import auroc, echoed, exposure, interval, power
from fedsynth.federation.messages import Finetune, SelfTrain, Synthesize, Vote
from fedsynth.federation.strategy import load_strategy
from fedsynth.lora import Adapter
from fedsynth.models.adapters import new_adapter
from fedsynth.models.chat import Chat, Opening
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import load_generator, load_tokenizer
from fedsynth.models.sampling import SamplingParams
from fedsynth.reporting.site_report import NEAR
from fedsynth.rouge import nearest, words
from fedsynth.scenario.schema import Cell, Scenario
from fedsynth.scenario.toml import cells, load, to_toml
from fedsynth.synthesis.augmentation import Demonstrating
from fedsynth.synthesis.self_instruct import OVERLAP
from fedsynth.synthesis.student import write
from fedsynth.synthesis.voting import kept
from fedsynth.synthesis.writing import NOTHING, Curation
from fedsynth.synthesis.writing import write as write_texts
from fedsynth.training.dp_training import next_token_losses
from fedsynth.training.engine import Engine

RARE = (  # noqa: SIM905 - as a list it would be a page
    "abelia agouti alembic amaranth anhydrite anvil astrolabe axolotl baobab basilisk bassoon beryl bismuth bodkin "
    "calliope capybara carillon chalcedony cinnabar clavichord cormorant dirigible dulcimer echidna feldspar ferret "
    "gannet gazebo gneiss halberd harpsichord hyacinth ibex jacaranda jasper kestrel kumquat lapwing lemur loquat "
    "mandolin marzipan narwhal obelisk obsidian ocarina okapi oriole pangolin persimmon phlox quagga quince rhubarb "
    "saffron sextant sorrel tamarind tapir turquoise vetiver walrus yarrow zither"
).split()
REPEATS = (1, 4, 16)
LONGEST_PREFIX = 16  # words: the canary's own must not be cut off
TRIES = 4  # sampled continuations of each canary


@dataclass(frozen=True)
class Size:
    """Rows and canaries of a case.

    Attributes:
        members: Private rows beside the canaries.
        canaries: Canaries of each number of repeats.
        controls: Canaries that are in no row.
        alternatives: Random suffixes that a canary's own is ranked among.
    """

    members: int
    canaries: int = 4
    controls: int = 8
    alternatives: int = 31


@dataclass(frozen=True)
class Canary:
    """A text of the source, and the words that follow it; in `repeats` rows of one unit."""

    prefix: str
    answer: str
    suffix: str
    repeats: int


@dataclass(frozen=True)
class Planted:
    """A client's rows with canaries among them, and rows of the same source that it does not hold."""

    train: Corpus
    members: Corpus
    others: Corpus
    canaries: tuple[Canary, ...]
    space: tuple[str, ...]


@dataclass
class Seen:
    """What the two adversaries see of a case; scores are higher for text that looks more like training text.

    Attributes:
        case: Its name.
        guarantee: As the client states it.
        epsilon: None without a guarantee.
        steps: Steps of training; 0 for votes.
        exposures: Of each canary, bits.
        greedy: Of each canary, whether the greedy continuation holds its words.
        sampled: Of each canary, whether one of `TRIES` sampled ones does.
        repeats: Of each canary, rows of its unit.
        members: Score of each member: its loss, negative; for votes the counts of its nearest text.
        others: Likewise of each row held out.
        known: For votes: the scores by an adversary that knows all other rows, of members and of others.
        texts: Number of texts that the adversary sees.
        echoes: Of each canary, texts that hold its words.
        rare: Texts that hold a word of any canary.
        near: ROUGE-L of each text with its nearest private row, and with its nearest row held out.
        closest: ROUGE-L of each member and of each other row with its nearest text.
        seconds: CPU time.
    """

    case: str
    guarantee: str = "none"
    epsilon: float | None = None
    steps: int = 0
    exposures: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    members: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    known: tuple[list[float], list[float]] | None = None
    texts: int = 0
    echoes: list[int] = field(default_factory=list)
    rare: int = 0
    near: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    closest: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    seconds: float = 0.0


# --- Canaries ---------------------------------------------------------------------------------------------------------


def plant(rows: Corpus, size: Size, seed: int) -> Planted:
    """Divides rows at random into members, others and prefixes of canaries, and plants these.

    Args:
        rows: Rows of one source.
        size: How many of each.
        seed: Public seed.

    Raises:
        ValueError: If there are too few rows, or too few short ones.
    """
    rng = np.random.default_rng([seed, 0xCA9A])
    order = rng.permutation(len(rows)).tolist()
    wanted = [n for n in REPEATS for _ in range(size.canaries)] + [0] * size.controls
    short = [i for i in order if len(words(rows.prompts[i])) <= LONGEST_PREFIX][: len(wanted)]
    left = [i for i in order if i not in set(short)]
    if len(short) < len(wanted) or len(left) < 2 * size.members:
        raise ValueError(
            f"{2 * size.members} rows and {len(wanted)} short ones for canaries are needed, got {len(left)} and "
            f"{len(short)} of {len(rows)}: use fewer members or canaries"
        )
    members, others = rows.take(left[: size.members]), rows.take(left[size.members : 2 * size.members])
    held = {word for text in (*rows.prompts, *rows.answers) for word in words(text)}
    space = tuple(word for word in RARE if word not in held)
    canaries = tuple(
        Canary(rows.prompts[i].strip(), rows.answers[i], suffix, repeats)
        for i, repeats, suffix in zip(short, wanted, suffixes(space, len(wanted), rng), strict=True)
    )
    planted = [(c, unit) for unit, c in enumerate(canaries) for _ in range(c.repeats)]
    train = Corpus(
        prompts=(*members.prompts, *(f"{c.prefix} {c.suffix}" for c, _ in planted)),
        answers=(*members.answers, *(c.answer for c, _ in planted)),
        provenance=Provenance.PRIVATE,
        units=(*range(len(members)), *(f"canary {unit}" for _, unit in planted)),
    )
    bare = [replace(corpus, units=None) for corpus in (members, others)]
    return Planted(train, bare[0], bare[1], canaries, space)


def suffixes(space: Sequence[str], count: int, rng: np.random.Generator, but: str = "") -> list[str]:
    """Pairs of words, each pair drawn alike from all pairs but one.

    A canary's words and those that it is ranked among come from the same draw, so that its rank is uniform for a model
    that never saw this canary, whatever it saw of the others.
    """
    found: list[str] = []
    while len(found) < count:
        one, other = rng.integers(len(space), size=2).tolist()
        if (pair := f"{space[one]} {space[other]}") != but:
            found.append(pair)
    return found


def client_with(cell: Cell, planted: Planted, work: Path) -> ClientSide:
    """A simulated client of a scenario's cell that holds these rows."""
    data = ClientData(planted.train, planted.others)
    units = len(planted.train if planted.train.units is None else set(planted.train.units))
    return replace(simulated_client(cell, 0, work, "memorisation"), open=lambda: data, records=units, shared=None)


def check_learnt(client: ClientSide, canaries: Sequence[Canary]) -> None:
    """Checks that a training example has room for a canary's words.

    Raises:
        ValueError: If some are cut off: nothing of them could be found.
    """
    texts = tuple(f"{c.prefix} {c.suffix}" for c in canaries)
    rows, tokenizer = (
        Corpus(texts, tuple(c.answer for c in canaries), Provenance.PRIVATE),
        load_tokenizer(client.config.generator),
    )
    for slot, canary in zip(slots_of(client, rows, len(rows)), canaries, strict=True):
        if not any(echoed([tokenizer.decode(example.tokens)], canary.suffix) for example in slot):
            raise ValueError(f"the words {canary.suffix!r} do not fit into a training example: use a larger max_length")


# --- The adversary that has the model ---------------------------------------------------------------------------------


def before(client: ClientSide, canary: Canary) -> Any:
    """A canary's text in the form in which the model learnt it, up to the rare words."""
    if not client.instructs:
        return f"{client.task.code(canary.answer)} {canary.prefix}"
    opening = client.form.opening()
    if isinstance(opening, Chat):
        return Opening(f"{opening.user} {canary.prefix}".strip(), opening.system, opening.shown)
    return f"{opening} {canary.prefix}"


def losses(client: ClientSide, model: Any, rows: Corpus) -> list[float]:
    """Mean loss of each row (nats per token), encoded as the client's training encodes it."""
    pad = load_tokenizer(client.config.generator).pad_token_id
    examples = [slot[0] for slot in slots_of(client, rows, len(rows))]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    found = [0.0] * len(examples)
    with torch.no_grad():
        for at in range(0, len(order), 16):
            part = order[at : at + 16]
            for i, loss in zip(part, next_token_losses(model, [examples[i] for i in part], pad).tolist(), strict=True):
                found[i] = loss
    return found


def exposures(client: ClientSide, llm: Any, planted: Planted, size: Size, seed: int) -> list[float]:
    """Bits of each canary."""
    rng, found = np.random.default_rng([seed, 0xE4]), []
    for canary in planted.canaries:
        others = suffixes(planted.space, size.alternatives, rng, but=canary.suffix)
        prompt = before(client, canary)
        scores = llm.score([prompt] * (len(others) + 1), [f" {each}" for each in (canary.suffix, *others)])
        found.append(exposure(scores[0], scores[1:]))
    return found


def extracted(client: ClientSide, llm: Any, planted: Planted) -> tuple[list[bool], list[bool]]:
    """Of each canary: whether the greedy continuation holds its words, and whether one of the sampled ones does."""
    prompts = [before(client, canary) for canary in planted.canaries]
    greedy = llm.complete(prompts, SamplingParams.greedy(12), seed=0)
    drawn = llm.complete(prompts * TRIES, SamplingParams(temperature=1.0, max_new_tokens=12), seed=0)
    own = [[text, *drawn[i :: len(prompts)]] for i, text in enumerate(greedy)]
    hits = [[bool(n) for n in (echoed(row[:1], c.suffix), echoed(row[1:], c.suffix))] for row, c in _with(own, planted)]
    return [first for first, _ in hits], [later for _, later in hits]


def _with(rows: Sequence[Any], planted: Planted) -> Iterator[tuple[Any, Canary]]:
    yield from zip(rows, planted.canaries, strict=True)


def look_at_model(seen: Seen, client: ClientSide, adapter: Adapter | None, planted: Planted, size: Size) -> None:
    """Fills in what the adversary finds that has the adapter; None for the base alone."""
    check_learnt(client, planted.canaries)
    name = client.config.generator
    model: Any = (load_generator(name) if adapter is None else on_base(client, adapter)).eval()
    llm = LocalLLM(model, load_tokenizer(name), batch_size=64, workers=1)
    seen.members = [-loss for loss in losses(client, model, planted.members)]
    seen.others = [-loss for loss in losses(client, model, planted.others)]
    seen.exposures = exposures(client, llm, planted, size, seed=1)
    seen.greedy, seen.sampled = extracted(client, llm, planted)


# --- The adversary that sees texts ------------------------------------------------------------------------------------


def look_at_texts(seen: Seen, texts: Sequence[str], planted: Planted, part: Callable[[Corpus], Sequence[str]]) -> None:
    """Fills in what texts tell.

    Args:
        seen: The figures.
        texts: The texts.
        planted: The rows.
        part: The part of rows that the texts stand for, such as their instructions.
    """
    own, other = part(planted.members), part(planted.others)
    seen.texts = len(texts)
    seen.echoes = [echoed(texts, canary.suffix) for canary in planted.canaries]
    rare = {word for c in planted.canaries if c.repeats for word in words(c.suffix)}
    seen.rare = sum(not rare.isdisjoint(words(text)) for text in texts)
    seen.near = nearest(texts, own), nearest(texts, other)
    seen.closest = nearest(own, texts), nearest(other, texts)


def prompts_of(rows: Corpus) -> Sequence[str]:
    return rows.prompts


def whole(rows: Corpus) -> Sequence[str]:
    return [f"{x} {y}" for x, y in zip(rows.prompts, rows.answers, strict=True)]


# --- The methods ------------------------------------------------------------------------------------------------------


def watched(function: Any, trained: list[TrainResult]) -> Any:
    """A client's function that trains; each adapter that it gets back is noted: FDKT's own never leaves the client."""
    reply = None
    while True:
        try:
            asked = function.send(reply)
        except StopIteration as end:
            return end.value
        reply = yield asked
        if isinstance(reply, TrainResult):
            trained.append(reply)


def _start(client: ClientSide) -> Adapter:
    settings = client.config.generator_training
    return new_adapter(client.config.generator, rank=settings.rank, alpha=settings.alpha, seed=0)


def _options(cell: Cell) -> Any:
    return load_strategy(cell.scenario.strategy)[1]


def fdkt(cell: Cell, client: ClientSide, planted: Planted, size: Size, seen: Seen) -> None:
    """The generator, and its drafts, which are all that leaves."""
    c, trained = _options(cell), list[TrainResult]()
    request = Synthesize(
        c.per_label, c.draft_temperature, c.draft_top_p, c.draft_tokens, 0, top_k=c.draft_top_k or None
    )
    [reply] = together([watched(synthesize(client, request, "order"), trained)])
    _state(seen, reply.statement, trained[0].steps)
    look_at_model(seen, client, trained[0].adapter, planted, size)
    look_at_texts(seen, reply.corpus.prompts, planted, prompts_of)


def knowledge_sg(cell: Cell, client: ClientSide, planted: Planted, size: Size, seen: Seen) -> None:
    """The adapter, which leaves, and the instructions that it writes at the server."""
    c, trained = _options(cell), list[TrainResult]()
    [reply] = together([watched(finetune(client, Finetune(_start(client), 0), "order"), trained)])
    _state(seen, reply.statement, trained[0].steps)
    look_at_model(seen, client, reply.adapter, planted, size)
    _written(c, client, reply.adapter, planted, seen)


def _written(c: Any, client: ClientSide, adapter: Adapter, planted: Planted, seen: Seen) -> None:
    how = SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens)
    name, task = client.config.generator, client.task
    found = write(Engine(), name, adapter, c.num_texts, how, seed=0, task=task, answered=False)
    look_at_texts(seen, found.corpus.prompts, planted, prompts_of)


def fed_pit(cell: Cell, client: ClientSide, planted: Planted, size: Size, seen: Seen) -> None:
    """The sent mix of adapters, and the records that the client's model writes after private ones."""
    options = {name: value for name, value in asdict(_options(cell)).items() if name != "aggregate"}
    written: list[Corpus] = []

    def noted(*args: Any) -> Corpus:
        written.append(select(*args))
        return written[-1]

    select = fedpit.syn_sel
    with patch.object(fedpit, "syn_sel", noted):
        reply = fedpit.self_train(client, SelfTrain(_start(client), 0, 1, **options))
    _state(seen, reply.statement, client.config.generator_training.steps)
    look_at_model(seen, client, reply.adapter, planted, size)
    look_at_texts(seen, whole(written[0]), planted, whole)


def base(cell: Cell, client: ClientSide, planted: Planted, size: Size, seen: Seen) -> None:
    """The model as it is published, and its texts: the figures of a model that saw no row."""
    c, start = _options(cell), _start(client)  # B is zero: the adapter changes nothing
    look_at_model(seen, client, None, planted, size)
    if client.instructs:
        return _written(c, client, start, planted, seen)
    codes = [client.task.code(label) for label in client.labels for _ in range(c.per_label)]
    how = SamplingParams(temperature=c.draft_temperature, top_p=c.draft_top_p, max_new_tokens=c.draft_tokens)
    llm = LocalLLM(on_base(client, start).eval(), load_tokenizer(client.config.generator), workers=1)
    return look_at_texts(seen, llm.complete(codes, how, seed=0), planted, prompts_of)


def evolution(
    cell: Cell,
    client: ClientSide,
    planted: Planted,
    size: Size,  # noqa: ARG001 - the signature of all methods
    seen: Seen,
    candidates: Callable[[Cell], Corpus],
) -> None:
    """The votes, and the kept texts, which a model wrote that saw no row."""
    c, offered = _options(cell), candidates(cell)
    request = Vote(offered, c.nearest)
    reply = vote(client, request, "order")
    _state(seen, reply.statement, 0)
    values = np.asarray(reply.votes.values)

    def counts(rows: Corpus) -> Any:
        """Each row's own votes, (rows, candidates)."""
        bearer = replace(client, open=lambda: ClientData(rows, rows), records=len(rows))
        cast = ballots(bearer, c.nearest, prepared(bearer, offered))
        return np.stack([summed([ballot], len(offered)) for ballot in cast])

    own, other = counts(planted.members), counts(planted.others)
    # What the adversary expects: the votes of others of the same source, without the row itself.
    seen.members = ((values - other.sum(0)) * own).sum(1).tolist()
    seen.others = ((values - (other.sum(0) - other)) * other).sum(1).tolist()
    # Or it knows all rows but one, and what they vote for.
    true = summed(ballots(client, c.nearest, prepared(client, offered)), len(offered))
    seen.known = ((values - (true - own)) * own).sum(1).tolist(), ((values - true) * other).sum(1).tolist()
    best = kept(offered, reply.votes, c.keep, select=c.select, threshold=c.threshold, seed=0)
    look_at_texts(seen, best.prompts, planted, prompts_of)


def written_once(place: Path, cell: Cell) -> Corpus:
    """The candidates: texts of the clients' model by the task card alone, kept in a file. No client is asked."""
    if not place.is_file():
        c, labels = _options(cell), label_list(cell.scenario.data)
        sampling = SamplingParams(temperature=c.temperature, top_p=c.top_p, max_new_tokens=c.max_new_tokens)
        found = write_texts(
            Engine().load(cell.scenario.client.generator),
            {0: NOTHING},
            Demonstrating(mode="none", shots=1, sampling=sampling),
            Curation(labels, c.min_words, c.sentences),
            num_texts=c.num_texts,
            seeds=[0, 1],
            task=cell.scenario.task,
            name="candidates",
        )[0].corpus
        place.write_text(json.dumps({"prompts": found.prompts, "answers": found.answers}), encoding="utf-8")
    found = json.loads(place.read_text(encoding="utf-8"))
    return Corpus(tuple(found["prompts"]), tuple(found["answers"]), Provenance.PUBLIC)


def _state(seen: Seen, said: Any, steps: int) -> None:
    seen.guarantee, seen.epsilon, seen.steps = said.guarantee, said.epsilon, steps


# --- Cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A scenario's arm with other settings, and the method that is run.

    Attributes:
        name: Its own; before the first hyphen, that of the data.
        scenario: A shipped scenario.
        arm: Its arm.
        run: Fills in what is seen.
        size: Rows and canaries.
        sets: Further settings, as of `fedsynth run --set`.
    """

    name: str
    scenario: str
    arm: str
    run: Callable[..., None]
    size: Size
    sets: tuple[str, ...] = ()


BANK, MEDICAL = Size(160), Size(96)
NONE = "client.guarantee=none"
ROWS = f"client.generator_training.rows_per_unit={max(REPEATS)}"
# A tenth of the units in a step, as many as of the scenarios' own clients or a little more; fewer texts than theirs.
BANK_SETS = (
    ROWS,
    "client.generator_training.expected_batch_size=16",
    "client.generator_training.max_physical_batch_size=8",
    "strategy.per_label=8",
)
VOTE_SETS = (f"client.voting.rows_per_unit={max(REPEATS)}",)
MEDICAL_SETS = (ROWS, "client.generator_training.max_length=72")
PAIRS = ("strategy.candidates=24", "strategy.keep=24", "strategy.max_new_tokens=48")


def cases(epochs: int, bank: Size = BANK, medical: Size = MEDICAL) -> list[Case]:
    """All cases, in the order in which they are run.

    Args:
        epochs: Passes of the training by heart.
        bank: Rows of the bank.
        medical: Rows of the institute.
    """
    steps = round(epochs * (bank.members + len(REPEATS) * bank.canaries) / 16)
    by_heart = (f"client.generator_training.steps={steps}", "client.generator_training.learning_rate=2e-3")

    def fdkt_(name: str, *sets: str, run: Any = fdkt) -> Case:
        return Case(f"bank-{name}", "banking77-real", "fdkt", run, bank, (*BANK_SETS, *sets))

    def votes(name: str, *sets: str) -> Case:
        return Case(f"bank-votes-{name}", "banking77-evolution", "evolution", evolution, bank, (*VOTE_SETS, *sets))

    def medquad(name: str, *sets: str, run: Any = knowledge_sg, arm: str = "knowledge_sg") -> Case:
        return Case(f"medquad-{name}", "medquad-real", arm, run, medical, (*MEDICAL_SETS, *sets))

    return [
        fdkt_("base", run=base),
        fdkt_("fdkt-8", *epsilon(8)),
        fdkt_("fdkt-none", NONE),
        medquad("base", run=base),
        medquad("knowledge_sg-8", *epsilon(8)),
        medquad("knowledge_sg-none", NONE),
        medquad("fedpit", NONE, *PAIRS, run=fed_pit, arm="fedpit"),
        votes("none", NONE),
        votes("8", *epsilon(8)),
        votes("2", *epsilon(2)),
        fdkt_("fdkt-by-heart", NONE, *by_heart),
        fdkt_("fdkt-2", *epsilon(2)),
        medquad("knowledge_sg-2", *epsilon(2)),
    ]


def epsilon(value: float) -> tuple[str, ...]:
    """Settings of a budget."""
    return ("client.guarantee=dp", f"client.budget.epsilon={value}")


def cell_of(case: Case) -> Cell:
    """The cell that a case runs, under the first seed."""
    scenario: Scenario = replace(load(case.scenario, ()), run=(case.arm,))
    [cell] = [cell for cell in cells(scenario) if cell.seed == scenario.seeds[0]]
    return replace(cell, scenario=_with_sets(case, cell))


def _with_sets(case: Case, cell: Cell) -> Scenario:
    """The arm's own settings come before those of the case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{cell.scenario.name}.toml"
        path.write_text(to_toml(replace(cell.scenario, arms={}, run=())), encoding="utf-8")
        return load(path, case.sets)


def rows_of(cell: Cell, size: Size) -> Corpus:
    """Rows of one source, as many as are needed: the customers of one bank, or the questions of one institute."""
    data = cell.scenario.data
    needed = 2 * size.members + len(REPEATS) * size.canaries + size.controls
    if data.per_label:
        alone = replace(data, clients=1, per_label=(-(-needed * 5 // (4 * len(label_list(data)))),), tuned_on=())
        return open_sites(alone, cell.seed)[0].train
    return max((site.train for site in open_sites(replace(data, limit=None), cell.seed)), key=len)


def measured(case: Case, folder: Path) -> Seen:
    """Runs a case."""
    begun, cell, size = time.process_time(), cell_of(case), case.size
    planted, seen = plant(rows_of(cell, size), size, cell.seed), Seen(case.name)
    seen.repeats = [canary.repeats for canary in planted.canaries]
    with tempfile.TemporaryDirectory() as work:
        client = client_with(cell, planted, Path(work))
        run = partial(evolution, candidates=partial(written_once, folder / "candidates.json"))
        (run if case.run is evolution else case.run)(cell, client, planted, size, seen)
    seen.seconds = time.process_time() - begun
    return seen


# --- The table --------------------------------------------------------------------------------------------------------


def told(found: Sequence[Seen]) -> list[str]:
    """The tables, as Markdown."""
    bases = {seen.case.partition("-")[0]: seen for seen in found if seen.case.endswith("-base")}
    lines = [
        "| case | epsilon | steps | loss, nats: members, others | exposure, bits: 0 / 1 / 4 / 16 rows "
        "| extracted, greedy (sampled): 1 / 4 / 16 | AUC by loss | AUC less the base's | TPR at FPR 0.1 / 0.01 |",
        "|---|---:|---:|---|---|---|---|---|---|",
    ]
    for seen in found:
        if not seen.exposures:
            continue
        reference, plain = bases.get(seen.case.partition("-")[0]), _members(seen, None)
        less = _members(seen, reference)
        beside = f"{_auc(*less)} | {power(*less, 0.1):.3f} / {power(*less, 0.01):.3f}"
        lines.append(
            f"| {seen.case} | {_epsilon(seen)} | {seen.steps} | "
            f"{-np.mean(seen.members):.2f}, {-np.mean(seen.others):.2f} | "
            + " / ".join(f"{np.mean(_by(seen, seen.exposures, n)):.2f}" for n in (0, *REPEATS))
            + " | "
            + " / ".join(f"{sum(_by(seen, seen.greedy, n))} ({sum(_by(seen, seen.sampled, n))})" for n in REPEATS)
            + f" | {_auc(*plain)} | {'- | -' if reference in (None, seen) else beside} |"
        )
    lines += [
        "",
        "| case | epsilon | texts | with a canary's words: 1 / 4 / 16 rows | with any rare word "
        f"| near a private row, another: from ROUGE-L {OVERLAP:g} | from {NEAR:g} | AUC by the nearest text |",
        "|---|---:|---:|---|---:|---|---|---|",
    ]
    for seen in found:
        echo = " / ".join(str(sum(_by(seen, seen.echoes, n))) for n in REPEATS)
        close = [", ".join(str(sum(v >= least for v in part)) for part in seen.near) for least in (OVERLAP, NEAR)]
        lines.append(
            f"| {seen.case} | {_epsilon(seen)} | {seen.texts} | {echo} | {seen.rare} "
            f"| {close[0]} | {close[1]} | {_auc(*seen.closest)} |"
        )
    lines += [
        "",
        "| votes | epsilon | AUC, others of the source known | AUC, all other rows known | TPR at FPR 0.1 / 0.01 |",
    ]
    lines += ["|---|---:|---|---|---|"]
    lines += [
        f"| {seen.case} | {_epsilon(seen)} | {_auc(seen.members, seen.others)} | {_auc(*seen.known)} | "
        f"{power(*seen.known, 0.1):.3f} / {power(*seen.known, 0.01):.3f} |"
        for seen in found
        if seen.known is not None
    ]
    return lines


def _by(seen: Seen, values: Sequence[Any], repeats: int) -> list[Any]:
    return [value for value, own in zip(values, seen.repeats, strict=True) if own == repeats]


def _epsilon(seen: Seen) -> str:
    if seen.case.endswith("-base"):
        return "-"  # saw no row
    return "none" if seen.epsilon is None else f"{seen.epsilon:.2f}"


def _members(seen: Seen, reference: Seen | None) -> tuple[list[float], list[float]]:
    """Scores of members and others, less those of a model that saw neither."""
    if reference is None:
        return seen.members, seen.others
    return (
        [a - b for a, b in zip(seen.members, reference.members, strict=True)],
        [a - b for a, b in zip(seen.others, reference.others, strict=True)],
    )


def _auc(positive: Sequence[float], negative: Sequence[float]) -> str:
    low, high = interval(auroc, positive, negative)
    return f"{auroc(positive, negative):.3f} [{low:.3f}, {high:.3f}]"


def saved(place: Path) -> Seen:
    return Seen(**json.loads(place.read_text(encoding="utf-8")))


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path, help="folder of the cases' figures; what is there is not run again")
    ask.add_argument("--only", nargs="*", default=[], help="beginnings of cases' names; left out, all")
    ask.add_argument("--epochs", type=int, default=10, help="passes of the training by heart")
    chosen = ask.parse_args()
    if chosen.out is None:
        print("give a folder for the figures: --out FOLDER; the models and data are those of docs/real-models.md")
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = []
    for case in cases(chosen.epochs):
        place = chosen.out / f"{case.name}.json"
        if not place.is_file() and case.name.startswith(tuple(chosen.only or [""])):
            part = place.with_suffix(".part")
            part.write_text(json.dumps(asdict(measured(case, chosen.out))), encoding="utf-8")
            part.replace(place)
        if place.is_file():
            found.append(saved(place))
            print(f"{case.name}: {found[-1].seconds:.0f} CPU s", flush=True)
    print("", *told(found), sep="\n")


if __name__ == "__main__":
    main()
