"""A client's models and trainings, and the plans that its budget pays for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

from fedsynth.limits import MAX_ALPHA, MAX_RANK, MAX_ROWS, MAX_SIGMA, Tokens, most
from fedsynth.privacy.cohort import Cohort
from fedsynth.privacy.plan import Budget, DPPlan, Mechanism, plan
from fedsynth.scenario.hardware import Precision
from fedsynth.typed import BadValue, Count, Positive, Range, in_range

Clipping: TypeAlias = Literal["bookkeeping", "hooks", "ghost"]
"""Ways to clip gradients per example: `fedsynth.dpsgd`."""


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
        share: FDKT judged by votes of clients that give drafts, too: this share of the budget's epsilon is for a
            client's votes; its generator has the noise with which both together keep the budget. 0: a client's whole
            budget is for one of the two.
    """

    max_length: Tokens = 128
    rows_per_unit: Annotated[Count, most(MAX_ROWS)] = 1
    share: Annotated[float, Range("lie in [0, 1)", lambda value: 0 <= value < 1)] = 0.0

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
        secure_sum: The cohort whose votes, or scores under noise, the server sees as a sum alone (docs/secure-sum.md);
            left out, each client's numbers have noise enough of their own.
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
    secure_sum: Cohort | None = None
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
        """The schedule of a client's DP training; it is charged, run and reported. Votes of the same client, if there
        are any, cost the same budget: see `Voting.share`.

        Args:
            records: Declared, public number of privacy units.
            rounds: Rounds that train on private text.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
            BadValue: If the run has no budget.
        """
        beside = (self.vote_plan(records, rounds),) if self.voting.share else ()
        return self._plan(self.generator_training, records, rounds, beside=beside)

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
        return self._plan(whole, 1, rounds, "summed_scores" if self.secure_sum else "scores")

    def vote_plan(self, records: int, rounds: int = 1) -> DPPlan:
        """The schedule of the votes of all rounds: every unit votes in every round, and moves a sum by 1 at most.

        It costs the share of the budget that is for votes, where clients give drafts as well, and else all of it.

        Args:
            records: Declared, public number of privacy units.
            rounds: Rounds of the run.

        Raises:
            fedsynth.privacy.plan.BudgetTooSmall: If no allowed noise fits the budget.
            BadValue: If the run has no budget.
        """
        every = GeneratorTraining(expected_batch_size=records, steps=1, clip_norm=1.0)
        share = self.voting.share or 1.0
        return self._plan(every, records, rounds, "summed_votes" if self.secure_sum else "votes", share=share)

    def _plan(
        self,
        settings: GeneratorTraining,
        records: int,
        rounds: int,
        mechanism: Mechanism = "gradients",
        *,
        share: float = 1.0,
        beside: tuple[DPPlan, ...] = (),
    ) -> DPPlan:
        if self.budget is None:
            raise BadValue("a run without a budget has no plan")
        return plan(
            self.budget if share == 1.0 else replace(self.budget, epsilon=share * self.budget.epsilon),
            records=records,
            expected_batch=min(settings.expected_batch_size, records),
            steps=settings.steps,
            rounds=rounds,
            clip_norm=settings.clip_norm,
            max_noise_multiplier=self.max_noise_multiplier,
            mechanism=mechanism,
            beside=beside,
        )

    def of(self, index: int) -> Client:
        """The settings of the client `index`: its own one of `task_models`, float32 for "auto" under a guarantee."""
        own, training = self, self.generator_training
        if self.guarantee == "dp" and training.precision == "auto":
            own = replace(own, generator_training=replace(training, precision="float32"))
        return replace(own, task_model=self.task_models[index % len(self.task_models)]) if self.task_models else own
