"""One experiment as typed, frozen, checked data: each key of a scenario is a field here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias

from fedsynth.corpus import alike, told_apart
from fedsynth.limits import MAX_ALPHA, MAX_RANK, MAX_ROWS, MAX_SIGMA, MAX_STEPS, Tokens, most
from fedsynth.privacy.plan import Budget, DPPlan, plan
from fedsynth.scenario.hardware import Precision
from fedsynth.scenario.server import Server, check_unguarded
from fedsynth.scenario.task import Task, slots_of
from fedsynth.typed import BadValue, Count, Positive, Range, Share, in_range

Clipping: TypeAlias = Literal["bookkeeping", "hooks", "ghost"]
"""Ways to clip gradients per example: `fedsynth.dpsgd`."""


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy that runs: an importable class, and the options of its `Config`."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.use.count(":") != 1:
            raise BadValue(f'strategy.use must read "package.module:Class", got {self.use!r}')


@dataclass(frozen=True)
class TestRows:
    """Test rows of a data file, which are held out: those whose `column` equals `equals`."""

    column: str
    equals: str


PAIR = "{first} | {second}"
_HALVES = frozenset(("first", "second"))


def check_pair(text: str | tuple[str, ...], pair: str | None) -> None:
    """Checks which columns hold the text, and how two of them become one.

    Raises:
        BadValue: If there are not one or two columns, or the template is not one of a pair.
    """
    if not isinstance(text, str) and (len(text) != 2 or text[0] == text[1]):
        raise BadValue(f"data.text must name one column, or two different ones for a pair, got {list(text)}")
    if pair is None:
        return
    if isinstance(text, str):
        raise BadValue("data.pair says how two columns become one text: data.text names one")
    slots_of("data.pair", pair, _HALVES, _HALVES)


@dataclass(frozen=True)
class Data:
    """A labelled data set and its division among clients.

    Attributes:
        source: `world:NAME` (a simulated world), `hf:NAME` (a Hugging Face data set), or a CSV, JSONL or Parquet file
            or a folder written by `datasets.save_to_disk`, looked up beside the scenario, in the working directory,
            then in the folder that the environment variable FEDSYNTH_DATA names. The column `split` names the split of
            a data set.
        clients: Number of clients; each is one hospital or bank.
        labels: The public label list; "all" takes those of a simulated world or file (never allowed at a real site).
        train_per_client: Simulated worlds: private notes per client.
        test_per_client: Simulated worlds: test notes per client, declared public (docs/privacy.md).
        text: Column of the text; two columns, as ["premise", "hypothesis"], for a pair, which becomes one text.
        pair: How the two become one, with the slots `{first}` and `{second}`; left out, `{first} | {second}`. A row
            that lacks one of them has no text. All that follows sees the one text: write it on one line, as texts
            are written.
        label: Column of the class name.
        attributes: Further columns whose public values and their wordings the card lists, [task.attributes.COLUMN]: a
            generator learns texts after label and values, and is asked for all combinations alike. A row with an
            unlisted value is a record of which no generator learns anything, whatever `unlisted` says.
        task: `classification`: text -> one of a list of labels. `instructions`: text (an instruction) -> free response.
            `choice`: the rows of a classification as instructions, each a question about the text to which the label's
            wording is the response (`task.templates.choice`), so that every method runs on the same rows; or, with
            `options`, multiple choice. Simulations.
        options: `choice`: columns of a question's own options, as ["a", "b", "c", "d"] (the last ones may be empty), or
            one column with a list of them, in a CSV file as JSON. `label` is then the column of the right one. A row
            with one option, more than 26, two that are the same, or no right one among them has no answer.
        answer_as: `options`: what names the right one: its `letter` (A, B, ...), its `index` (0, 1, ...), or its
            `text`.
        response: `instructions`: column of the response.
        notes_per_patient: Simulated worlds: a patient has from 1 to this many of the notes. Above 1 the patient is the
            privacy unit. The notes are the same.
        planted: Simulated worlds, `instructions`: every private response ends with its own secret, for audits.
        test: Rows held out for testing; left out, a seeded fifth of each client's rows.
        split: `iid`; `dirichlet` or `pathological`: by label; `natural`: by the values of `client_column`, the first
            `clients` of them in sorted order.
        alpha: `dirichlet`: concentration; the smaller, the more the clients differ.
        classes_per_client: `pathological`: number of classes that each client holds.
        client_column: Column whose values are the natural clients.
        unit: Column of the person; left out, rows are declared independent.
        limit: At most so many private units per client, drawn after the split.
        unlisted: Rows whose label `labels` does not list: `count` keeps them as records of which nothing is learnt, as
            a site's rows are; `drop` leaves them out before the source is divided: the task is a part of the source.
        per_label: At most so many private rows of each label, drawn after the split: one number, or one for each
            client, as [100, 3] for a rich client and a poor one.
        test_limit: At most so many test units per client, likewise.
        duplicates: `refuse` rejects a text that two clients hold, or that is in training and test text. `drop` keeps
            one copy of each text, also within a client, before the source is divided. Texts are compared as in
            `spellings`.
        spellings: `refuse` rejects a person or a client in several spellings; `merge` counts all its spellings as one.
            Spellings differ in case, blanks, composed characters and characters without a glyph. Labels in several
            spellings are always refused.
        revision: `hf:`: branch, tag or commit.
        subset: `hf:`: configuration of the data set.
        public: A declaration: anyone may read the clients' text, as that of a published data set. Then text without a
            guarantee may go to an endpoint on another machine. A simulated world's text is public.
        pooled: One client that holds all clients' text: a baseline that only a simulator can build.
        tuned_on: Clients on which settings were tuned; results are reported without them, too. The list may name more
            clients than a smaller run has.
    """

    source: str
    clients: Count = 8
    labels: Literal["all"] | tuple[str, ...] = "all"
    train_per_client: Count = 200
    test_per_client: Count = 600
    text: str | tuple[str, ...] = "text"
    pair: str | None = None
    label: str = "label"
    attributes: tuple[str, ...] = ()
    task: Literal["classification", "instructions", "choice"] = "classification"
    options: tuple[str, ...] = ()
    answer_as: Literal["letter", "index", "text"] = "letter"
    response: str = "response"
    notes_per_patient: Count = 1
    planted: bool = False
    test: TestRows | None = None
    split: Literal["iid", "dirichlet", "pathological", "natural"] = "iid"
    alpha: Positive = 0.5
    classes_per_client: Count | None = None
    client_column: str | None = None
    unit: str | None = None
    limit: Count | None = None
    unlisted: Literal["count", "drop"] = "count"
    per_label: int | tuple[int, ...] | None = None
    test_limit: Count | None = None
    duplicates: Literal["refuse", "drop"] = "refuse"
    spellings: Literal["refuse", "merge"] = "refuse"
    revision: str | None = None
    subset: str | None = None
    public: bool = False
    pooled: bool = False
    tuned_on: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        in_range(self, "data")
        check_pair(self.text, self.pair)
        if self.labels != "all" and not self.labels:
            raise BadValue("the label list is empty: name the classes, or leave `labels` out to take all of the source")
        if self.labels != "all" and len(set(self.labels)) < len(self.labels):
            raise BadValue(f"labels holds a class twice: {sorted(self.labels)}")
        if min(self.tuned_on, default=0) < 0 or len(set(self.tuned_on)) < len(self.tuned_on):
            raise BadValue(f"tuned_on must name distinct clients, from 0, got {list(self.tuned_on)}")
        if self.world is not None and (self.unit or self.test or self.client_column or self.split != "iid"):
            raise BadValue("unit, test, client_column and split belong to data files, not to a simulated world")
        if self.labels != "all" and (found := alike(self.labels)):
            raise BadValue(f"labels holds a class in several spellings: {', '.join(map(told_apart, found))}")
        if self.world is not None and (self.limit or self.test_limit or self.duplicates != "refuse"):
            raise BadValue(
                "limit, test_limit and duplicates belong to data files; a simulated world has train_per_client"
            )
        if self.unlisted != "count" and (self.labels == "all" or self.world is not None):
            raise BadValue('unlisted = "drop" belongs to a data file of which `labels` lists some classes')
        if self.per_label is not None:
            counts = (self.per_label,) if isinstance(self.per_label, int) else self.per_label
            if not counts or min(counts) < 1:
                raise BadValue(f"data.per_label must be at least 1, for each client, got {self.per_label}")
            if isinstance(self.per_label, tuple) and len(counts) != self.clients:
                raise BadValue(f"data.per_label names {len(counts)} clients, data.clients is {self.clients}")
            if self.world is not None or self.task == "instructions" or self.unit is not None:
                raise BadValue("per_label belongs to data files of labelled rows that are declared independent")
        if self.options and (self.task != "choice" or self.world is not None):
            raise BadValue('options are columns of a data file with task = "choice"')
        if self.attributes and (self.task != "classification" or self.world is not None):
            raise BadValue('attributes are columns of a data file with task = "classification"')
        if len(set(self.attributes)) < len(self.attributes):
            raise BadValue(f"data.attributes names a column twice: {list(self.attributes)}")
        texts = (self.text,) if isinstance(self.text, str) else self.text
        if taken := set(self.attributes) & {*texts, self.label, self.unit}:
            raise BadValue(f"data.attributes names {min(taken)!r}, the column of the text, the label or the person")
        if self.options and (self.labels != "all" or self.per_label is not None):
            raise BadValue("labels and per_label are about classes, and with options each row brings its own")
        if self.options and self.split in ("dirichlet", "pathological"):
            raise BadValue(f'split = "{self.split}" goes by label, and options have none: use "iid" or "natural"')
        if len(set(self.options)) < len(self.options):
            raise BadValue(f"data.options names a column twice: {list(self.options)}")
        if self.answer_as != Data.answer_as and not self.options:
            raise BadValue("answer_as says which of a row's options is right: name their columns as options")
        if self.spellings != "refuse" and not (self.unit or self.client_column):
            raise BadValue("spellings is about persons and clients: name their column as unit or client_column")
        if self.task == "instructions" and self.labels != "all":
            raise BadValue('labels belong to task = "classification"; responses are not of a list')
        if self.task == "instructions" and self.split in ("dirichlet", "pathological"):
            raise BadValue(f'split = "{self.split}" goes by label, and instructions have none: use "iid" or "natural"')
        if self.response != Data.response and (self.task != "instructions" or self.world is not None):
            raise BadValue('response is the column of a data file with task = "instructions"')
        if self.planted and (self.world is None or self.task != "instructions"):
            raise BadValue('planted belongs to a simulated world with task = "instructions"')
        if self.world is not None and not isinstance(self.text, str):
            raise BadValue("a pair of columns belongs to data files, not to a simulated world")
        if self.split == "natural" and self.client_column is None:
            raise BadValue('split = "natural" needs client_column: the column whose values are the clients')
        if self.alpha != Data.alpha and self.split != "dirichlet":
            raise BadValue(f'alpha belongs to split = "dirichlet", not to {self.split!r}')
        if (self.classes_per_client is not None) != (self.split == "pathological"):
            raise BadValue('classes_per_client and split = "pathological" need each other')
        if self.world is None and self.notes_per_patient != 1:
            raise BadValue("notes_per_patient belongs to a simulated world: a data file names its persons by data.unit")
        if self.source == "hf:":
            raise BadValue('source = "hf:" names no data set: write hf:NAME')
        if self.hub_name is None and (self.revision or self.subset):
            raise BadValue(f"revision and subset belong to a source hf:NAME, not to {self.source!r}")

    @property
    def world(self) -> str | None:
        """Name of the simulated world, or None for a source of one's own."""
        return self.source.removeprefix("world:") if self.source.startswith("world:") else None

    @property
    def classes(self) -> bool:
        """True if answers are class names; False for responses, and for options that each row brings."""
        return self.task != "instructions" and not self.options

    @property
    def unit_name(self) -> str:
        """The privacy unit: the column of persons, a world's patients, or the row."""
        return self.unit or ("patient" if self.notes_per_patient > 1 else "row")

    @property
    def hub_name(self) -> str | None:
        """Name of the Hugging Face data set, or None for another source."""
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else None


@dataclass(frozen=True)
class WarmStart:
    """The server's training of the adapter that clients' generators start from, on its LLM's public zero-shot texts.

    It costs no privacy: the adapter is made before private text is opened, from the task card alone. More steps give
    drafts that fit their labels, and draw them away from private text.

    Attributes:
        epochs: Passes over the texts; the method says how many texts there are (FDKT: `strategy.num_texts`).
        batch: Texts per step.
        learning_rate: AdamW's learning rate; it decays linearly to a tenth.
        max_grad_norm: Longer gradients of a step are shortened to this norm.
    """

    epochs: Count = 2
    batch: Count = 8
    learning_rate: Positive = 2e-3
    max_grad_norm: Positive = 1.0

    def __post_init__(self) -> None:
        in_range(self)


@dataclass(frozen=True)
class GeneratorTraining:
    """A client's fine-tuning of its generator: LoRA under DP-SGD (settings tuned on simulated data only).

    Attributes:
        expected_batch_size: Expected size of a Poisson batch; the sampling rate is this / declared records.
        steps: Noisy steps of a round, all charged; 100,000 in all rounds at most.
        learning_rate: Adam's learning rate; it decays linearly to a tenth.
        clip_norm: Bound on the norm of one unit's gradient.
        rank: LoRA rank.
        alpha: LoRA scale is alpha / rank.
        max_length: Longest example in tokens, label or instruction and end of text included.
        max_physical_batch_size: Examples per forward pass; it bounds memory and does not change results.
        loss_on: Instructions: loss on the whole `record` (needed if the model will write instructions) or on the
            `response` only.
        rows_per_unit: The most rows of a unit that count, its first ones; their gradients are clipped together.
        clipping: Engine of DP-SGD; Opacus' `hooks` and `ghost` serve for comparison, `ghost` without a guarantee.
        precision: Precision of the generator's frozen base. `auto` is float32 under `dp`. `dp` refuses `bfloat16`, as
            no clip norm then bounds the influence of a text. Without `dp`, `auto` is bfloat16 on CPUs that compute in
            it, if the model is wide enough to gain; name a precision to compare arms or machines. A scorer is float32.
        cut: `sentences`: of a text longer than `max_length` the leading whole sentences that fit are learnt, with an
            end; of instructions, those of the response. Left out, it is cut after so many tokens, and teaches no end.
        gradient_checkpointing: A layer's activations are computed again in the backward pass instead of kept: less
            memory, longer steps, the same sums. It needs `clipping = "bookkeeping"`.
        lora_targets: Ends of the names of the linear layers that get a LoRA, such as `["q_proj", "v_proj"]`; left out,
            all but the heads.
        warm_start: Clients' generators start from an adapter that the server trained on its LLM's zero-shot texts; left
            out, from the model as it is. Plan and epsilon are the same.
    """

    expected_batch_size: Count = 50
    steps: Count = 60
    learning_rate: Positive = 2e-2
    clip_norm: Positive = 0.3
    rank: Count = 8
    alpha: Positive = 16.0
    max_length: int = 64
    max_physical_batch_size: Count = 64
    loss_on: Literal["record", "response"] = "record"
    rows_per_unit: Count = 1
    clipping: Clipping = "bookkeeping"
    precision: Precision = "auto"
    cut: Literal["sentences"] | None = None
    gradient_checkpointing: bool | None = None  # None: left out of a grant's settings, whose noise stays what it was
    lora_targets: tuple[str, ...] | None = None
    warm_start: WarmStart | None = None

    def __post_init__(self) -> None:
        in_range(self)
        if self.max_length < 4:
            raise BadValue(f"max_length must be at least 4, got {self.max_length}")
        if self.lora_targets is not None and not all(self.lora_targets or [""]):
            raise BadValue('lora_targets must hold names, such as ["q_proj"]; leave it out for all linear layers')
        if self.gradient_checkpointing and self.clipping != "bookkeeping":
            raise BadValue(
                f'gradient_checkpointing needs clipping = "bookkeeping": the hooks of "{self.clipping}" would note a '
                "layer's input twice"
            )


@dataclass(frozen=True)
class Tuning:
    """The server's training of an adapter on text that is free to use (supervised fine-tuning).

    Attributes:
        epochs: Passes over the text.
        batch: Examples per step.
        learning_rate: AdamW's learning rate; it decays linearly to a tenth.
        max_length: Longest example in tokens.
        max_grad_norm: Longer gradients of a step are shortened to this norm.
        rank: LoRA rank of a new adapter.
        alpha: LoRA scale is alpha / rank.
    """

    epochs: Count = 3
    batch: Count = 16
    learning_rate: Positive = 2e-3
    max_length: Count = 64
    max_grad_norm: Positive = 1.0
    rank: Annotated[Count, most(MAX_RANK)] = 8
    alpha: Annotated[Positive, most(MAX_ALPHA)] = 16.0

    def __post_init__(self) -> None:
        in_range(self)


SHOTS = 5
"""Private texts of a label that `trains = "few_shot"` looks at, at most."""


@dataclass(frozen=True)
class TaskTraining:
    """How a client trains its task model on the server's text and on its private text (the latter same in every arm).

    Attributes:
        schedule: `sequential`: the server's text first, then private text. `mixed`: both in one training, shuffled over
            each other, `private_epochs` passes. `synthetic_only`: the server's text alone, which is then measured on
            real text. Instructions: likewise, with the steps of `generator_training`.
        batch: Examples per step.
        augmented_epochs: Passes over the server's text, unless it is mixed with private text.
        private_epochs: Passes over the private text.
        learning_rate: AdamW's learning rate for training from the pretrained model.
        head_rate: Learning rate of the new head relative to that of the pretrained layers, if `trains` is `all`.
        token_dropout: Chance that a token is hidden during training, if `trains` is `all`.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Longer gradients of a step are shortened to this norm: one bad step can undo a small model.
        max_length: Longest text in tokens.
        trains: `all` of the model, or its `head` alone, on the mean of a frozen model's hidden states: for pretrained
            encoders where training all of them would take too long. Or a baseline that nothing is trained of:
            `majority` is the client's commonest private label; `few_shot` the label of the nearest of at most five
            private texts of each label; `zero_shot` the label whose wording is nearest; by cosine of those states.
            `llm_zero_shot`, for `data.task = "choice"`: `client.generator` as it is, such as the server's LLM.
        weights: `mixed`: weight of each text of the server in the loss. `equal`: as a private text. `agreement`: the
            probability of its label by a model of the client's private text alone. Weights stay at the client.
    """

    schedule: Literal["mixed", "sequential", "synthetic_only"] = "sequential"
    batch: Count = 16
    augmented_epochs: Count = 6
    private_epochs: Count = 15
    learning_rate: Positive = 1e-3
    head_rate: Positive = 50.0
    token_dropout: float = 0.1
    weight_decay: float = 0.05
    max_grad_norm: Positive = 1.0
    max_length: Count = 64
    trains: Literal["all", "head", "majority", "few_shot", "zero_shot", "llm_zero_shot"] = "all"
    weights: Literal["equal", "agreement"] = "equal"

    def __post_init__(self) -> None:
        in_range(self, "client.task_training")
        if not 0 <= self.token_dropout < 1:
            raise BadValue(f"token_dropout must lie in [0, 1), got {self.token_dropout}")
        if self.weights != "equal" and (self.schedule != "mixed" or self.baseline):
            raise BadValue(f'task_training.weights = "{self.weights}" belongs to schedule = "mixed" of a trained model')
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise BadValue(f"weight_decay must be finite and not negative, got {self.weight_decay}")

    @property
    def baseline(self) -> bool:
        """True if nothing of the task model is trained."""
        return self.trains not in ("all", "head")


@dataclass(frozen=True)
class Voting:
    """How a client's private texts vote for the server's (private evolution).

    Attributes:
        max_length: Longer texts are cut after so many tokens.
        rows_per_unit: The most rows of a unit that vote, the first ones. Their votes are scaled together to norm 1.
    """

    max_length: Tokens = 128
    rows_per_unit: Annotated[Count, most(MAX_ROWS)] = 1

    def __post_init__(self) -> None:
        in_range(self, "client.voting")


@dataclass(frozen=True)
class Client:
    """A client's models and training. A site's own policy may be stricter, never looser.

    Attributes:
        generator: Causal or seq2seq model: `assets:NAME`, `models:NAME`, a folder, or a Hugging Face name, also
            `org/name@revision`.
        task_model: Model of any kind that becomes a classifier, named likewise. Instructions need none: the generator
            itself learns to respond, with an adapter.
        task_models: Client k has the task model k % n of these n instead; architectures and tokenizers may differ.
        guarantee: `dp`, or `none` for a run without any guarantee (the report says so in words).
        budget: Epsilon and delta of this run, for all rounds and all releases.
        max_noise_multiplier: A budget that needs more noise than this is refused before any training; 1000 at most.
        generator_training: DP-SGD settings.
        task_training: Task model settings.
        answer_tokens: Instructions: longest response at evaluation.
        scores: Protection of scores of the server's texts under `dp` (CrossLM). `model`: a separate classifier,
            trained once under DP-SGD, gives the scores of all rounds. `noise`: the task model gives them; each round's
            list is clipped to `score_norm` and gets Gaussian noise, and the privacy unit is the client's whole data.
        scorer_training: `scores = "model"`: DP-SGD settings; `loss_on` and `precision` have no meaning there.
        score_norm: `scores = "noise"`: bound on the L2 norm of one round's list of scores.
        embedder: Private evolution: the sentence encoder, as it is published, that tells which texts are near. Left
            out, the task model.
        voting: Private evolution: how private texts vote for the server's.
        stacked: Simulations: number of clients whose adapters train in one pass of the model, each on its own text;
            left out, a number for which stacking pays. Results are the same except for rounding.
    """

    generator: str
    task_model: str = ""
    task_models: tuple[str, ...] = ()
    guarantee: Literal["dp", "none"] = "dp"
    budget: Budget | None = None
    max_noise_multiplier: Positive = 20.0
    generator_training: GeneratorTraining = GeneratorTraining()
    task_training: TaskTraining = TaskTraining()
    answer_tokens: Count = 32
    scores: Literal["model", "noise"] = "model"
    scorer_training: GeneratorTraining = GeneratorTraining()
    score_norm: Positive = 1.0
    embedder: str = ""
    voting: Voting = Voting()
    stacked: Count | None = None

    def __post_init__(self) -> None:
        in_range(self, "client")
        if "" in self.task_models:
            raise BadValue("task_models holds an empty name: name a model for every place, or leave task_models out")
        if self.guarantee == "dp" and self.budget is None:
            raise BadValue(
                'guarantee = "dp" needs a budget, e.g. budget = { epsilon = 8.0 }; or say guarantee = "none"'
            )

        if self.guarantee == "dp" and "ghost" in (self.generator_training.clipping, self.scorer_training.clipping):
            raise BadValue(
                'clipping = "ghost" is Opacus\' own, to compare its time with: a record that is not finite '
                'spoils its sum, so that no guarantee holds; say "bookkeeping" or "hooks"'
            )
        if self.scorer_training.warm_start is not None:
            raise BadValue("client.scorer_training.warm_start: a scorer writes no text; leave it out")
        if self.max_noise_multiplier > MAX_SIGMA:
            raise BadValue(f"max_noise_multiplier must be at most {MAX_SIGMA:g}, got {self.max_noise_multiplier:g}")
        if self.budget is not None and self.budget.delta > Budget.delta:
            raise BadValue(f"delta must be at most {Budget.delta:g}, got {self.budget.delta:g}: more is no guarantee")

    def plan(self, records: int, rounds: int = 1) -> DPPlan:
        """The schedule of a client's DP training; it is charged, run and reported.

        Args:
            records: Declared, public number of privacy units.
            rounds: Rounds that train on private text.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
            BadValue: If the run has no budget.
        """
        return self._plan(self.generator_training, records, rounds)

    def score_plan(self, records: int, rounds: int = 1) -> DPPlan:
        """The schedule of the mechanism that protects a client's scores in all rounds.

        `model`: one training; its model's scores in later rounds are post-processing. `noise`: one Gaussian mechanism
        a round on the client's data as a whole. Other data may change all scores, from one list within `score_norm` to
        another. Two such lists are at most twice `score_norm` apart, and that is the plan's clip norm.

        Args:
            records: Declared, public number of privacy units.
            rounds: Rounds of the run.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
            BadValue: If the run has no budget.
        """
        if self.scores == "model":
            return self._plan(self.scorer_training, records, 1)
        whole = GeneratorTraining(expected_batch_size=1, steps=1, clip_norm=2 * self.score_norm)
        return self._plan(whole, 1, rounds)

    def vote_plan(self, records: int, rounds: int = 1) -> DPPlan:
        """The schedule of the votes of all rounds: every unit votes in every round, and moves a sum by 1 at most.

        Args:
            records: Declared, public number of privacy units.
            rounds: Rounds of the run.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
            BadValue: If the run has no budget.
        """
        return self._plan(GeneratorTraining(expected_batch_size=records, steps=1, clip_norm=1.0), records, rounds)

    def _plan(self, settings: GeneratorTraining, records: int, rounds: int) -> DPPlan:
        if self.budget is None:
            raise BadValue("a run without a budget has no plan")
        return plan(
            self.budget,
            records=records,
            expected_batch=min(settings.expected_batch_size, records),
            steps=settings.steps,
            rounds=rounds,
            clip_norm=settings.clip_norm,
            max_noise_multiplier=self.max_noise_multiplier,
        )

    def of(self, index: int) -> Client:
        """The settings of the client `index`: its own one of `task_models`, float32 for "auto" under a guarantee."""
        own, training = self, self.generator_training
        if self.guarantee == "dp" and training.precision == "auto":
            own = replace(own, generator_training=replace(training, precision="float32"))
        return replace(own, task_model=self.task_models[index % len(self.task_models)]) if self.task_models else own


@dataclass(frozen=True)
class Participation:
    """Clients of a simulation that are away or leave. The server's own time limit is `server.timeout`.

    Attributes:
        availability: Chance that a client is available in a round; other clients are not asked and spend nothing.
        dropout: Chance that a client leaves an exchange before its answer arrives. Its spending counts.
        seed: Seed of absences and departures; the run's seed enters, too.
    """

    availability: Share = 1.0
    dropout: Annotated[float, Range("lie in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range(self, "participation")
        if self.seed < 0:
            raise BadValue(f"participation.seed must be at least 0, got {self.seed}")

    @property
    def loses(self) -> bool:
        """True if any client's answer can be missing."""
        return self.availability < 1 or self.dropout > 0


@dataclass(frozen=True)
class Scenario:
    """One experiment.

    Attributes:
        name: Name of the run directory.
        seeds: Public seeds; each gives a world of its own.
        rounds: Rounds of the strategy.
        arms: Variants: name -> overrides of the other tables.
        run: The arms that run by default; left out, all.
        participation: Clients that are away or leave.
        task: The task card: how the task and its labels are put into words.
    """

    name: str
    strategy: StrategyChoice
    data: Data
    client: Client
    server: Server
    seeds: tuple[int, ...] = (0,)
    rounds: Count = 1
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run: tuple[str, ...] = ()
    participation: Participation = field(default_factory=Participation)
    task: Task = field(default_factory=Task)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadValue(f"seeds must be distinct whole numbers >= 0, at least one, got {list(self.seeds)}")
        in_range(self)
        # Before any planning: a plan of so many steps would take a client minutes and gigabytes.
        for training, rounds in (("generator_training", self.rounds), ("scorer_training", 1)):
            if (steps := getattr(self.client, training).steps) * rounds > MAX_STEPS:
                times = f"{steps:,} in each of {rounds:,} rounds" if rounds > 1 else f"{steps:,}"
                raise BadValue(
                    f"client.{training}.steps must be at most {MAX_STEPS:,} over all rounds, got {times}: "
                    "take fewer, of larger batches"
                )
        check_unguarded(
            self.server, guarantee=self.client.guarantee, public=self.data.public or self.data.world is not None
        )
        if self.participation.loses and self.server.quorum == 1:
            raise BadValue(
                "participation lets clients be missing, and server.quorum is 1: the first missing one would "
                "end the run; lower server.quorum"
            )
        self._check_attributes()
        if self.data.task == "classification" and not (self.client.task_model or self.client.task_models):
            raise BadValue("client.task_model is missing: name the model that becomes a classifier")
        if self.data.task != "classification" and self.client.task_training.weights != "equal":
            raise BadValue('client.task_training.weights = "agreement" is about labels, and instructions have none')
        choosing = self.data.task == "choice" and self.client.task_training.trains == "llm_zero_shot"
        if self.client.task_training.trains == "llm_zero_shot" and not choosing:
            raise BadValue(
                'client.task_training.trains = "llm_zero_shot" asks a language model which label a text has: say '
                'data.task = "choice"'
            )
        if self.data.task != "classification" and self.client.task_training.baseline and not choosing:
            raise BadValue(
                f'client.task_training.trains = "{self.client.task_training.trains}" tells labels, and instructions '
                "have none: leave it out"
            )
        for arm in self.run:
            if arm not in self.arms:
                raise BadValue(f"run names the arm {arm!r}, which has no [arms.{arm}]; known: {', '.join(self.arms)}")

    def _check_attributes(self) -> None:
        named, told = sorted(self.data.attributes), list(self.task.columns)
        if named != told:
            raise BadValue(
                f"data.attributes names {named}, the card has values for {told}: every column of data.attributes needs "
                "its table [task.attributes.COLUMN] with values, and no other column has one"
            )
        if self.data.labels != "all":
            self.task.check_codes(len(self.data.labels))

    @property
    def stack(self) -> int:
        """Number of clients whose adapters train in one pass; by default there are at least eight such stacks."""
        clients, training = 1 if self.data.pooled else self.data.clients, self.client.generator_training
        if training.clipping != "bookkeeping":
            return 1
        pays = (
            min(STACK_TOKENS // training.max_length, training.max_physical_batch_size) // training.expected_batch_size
        )
        return self.client.stacked or max(1, min(pays if pays >= 4 else 1, clients // 8))


STACK_TOKENS = 1024  # tokens in a step of a stack: beyond, one pass takes as long as many (docs/results.md)


@dataclass(frozen=True)
class Cell:
    """One arm under one seed: a hypothetical world of its own."""

    arm: str
    seed: int
    scenario: Scenario

    def public_seed(self, purpose: str, *, round: int = 0, client: int = -1) -> int:
        """A separate public seed for each purpose; the arm does not enter, so that arms are paired."""
        text = f"{self.seed}/{round}/{client}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
