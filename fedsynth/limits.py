"""Caps on requests, replies and payloads in both directions, each with its reason.

All caps lie far above the needs of the methods. They keep a message from costing its reader more than its sender, and
a scenario from requests that no site answers.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fedsynth.typed import Count, Range

# ---- Bytes of a payload --------------------------------------------------------------------------------------------

MAX_BYTES = 1 << 30  # bytes of a whole payload: more is a mistake or an attack
MAX_HEAD = 1 << 25  # bytes of JSON that is parsed at once: the scalars, and the table of an adapter's tensors
MAX_VALUES = 1 << 20  # values in such a JSON: a score for each of MAX_TEXTS fits in
MAX_DEPTH = 16  # levels of such a JSON: requests and answers nest five deep
MAX_NAME = 500  # characters of a text in it: the longest are PEFT's names of tensors, of about a hundred
MAX_PARTS = 4  # members of one payload: requests and answers have at most three, their scalars, texts and an adapter
MAX_TENSORS = 20_000  # tensors of an adapter: two for each adapted layer

# ---- Texts ---------------------------------------------------------------------------------------------------------

MAX_TEXT = 20_000  # characters of one text: longer ones are dropped where they are written, and refused elsewhere
MAX_TEXTS = 1_000_000  # texts of one request or answer
MAX_SAMPLES = 100_000  # samples of one label
MAX_TOKENS = 8_192  # tokens of one text that a client writes or learns: 37,000 characters of English, above MAX_TEXT
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 10.0  # for a client's sampling: beyond, logits are flat, or leave float32
MIN_TOP_P = 0.01
MAX_TOP_K = 1 << 20  # likeliest tokens: no vocabulary has more
MAX_GRANTS = 100_000  # behind one text or adapter: a thousand clients, a hundred rounds

# ---- Training and adapters -----------------------------------------------------------------------------------------

MAX_STEPS = (
    100_000  # steps of all rounds: at 256 texts each, 25 passes over a million; to plan ten times as many took 25 s
)
MAX_BATCH = 65_536  # examples of one forward pass
MAX_MICROBATCH = 4_096  # clipped gradients that one pass adds in float32: rounding stays below a unit's margin
MAX_ROWS = MAX_MICROBATCH  # rows of a unit, which goes through in one pass
MAX_RANK = 1_024  # rank of a LoRA: that of full layers of small models
MAX_ALPHA = 1e6
MAX_WEIGHT = 1e6  # largest number in a factor of a LoRA: products and means of larger ones leave float32's range
MAX_RATE = 1e3  # learning rate
CLIP_NORMS = (1e-6, 1e6)  # beyond, single precision does not keep a unit's sum within the bound
MAX_PROXIMAL = 1e6
MAX_SEED = 2**32 - 2

# ---- Self-generation -----------------------------------------------------------------------------------------------

MAX_CANDIDATES = 10_000  # candidates of one request
MAX_SHOTS = 64  # demonstrations in a prompt
MAX_NEAREST = 64  # candidates that a private text votes for
MAX_CLIENTS = 1_000_000  # clients of a run, whose numbers stand in the messages of a secure sum

# ---- Statements ----------------------------------------------------------------------------------------------------

MAX_RECORDS = 10**9  # privacy units of one site: no data set has more persons
MAX_EPSILON = 1e6  # more than any budget that means something
MAX_DELTA = 1e-5  # a larger delta is no guarantee (docs/privacy.md)
MIN_DELTA = 1e-12  # below, only rounding errors in the tails of privacy losses are left to count
MAX_SIGMA = 1e3  # noise multiplier, on a sum of whole clipped gradients
MAX_LOSS = 1e6  # nats per token: a broken model reaches it, and a client reports no more
MAX_SCORE = 1e12  # score of a text: noise of the largest multiplier on the largest norm is a thousandth of it


def most(limit: float) -> Range:
    """An upper limit for a number of a scenario, as `Annotated[Count, most(MAX_TEXTS)]`."""
    return Range(f"be at most {limit:{'d' if isinstance(limit, int) else 'g'}}", lambda value: value <= limit)


def least(limit: float) -> Range:
    """A lower limit; see `most`."""
    return Range(f"be at least {limit:g}", lambda value: value >= limit)


Tokens: TypeAlias = Annotated[Count, most(MAX_TOKENS)]
