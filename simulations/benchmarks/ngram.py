"""Is a pretrained model better than counting? Its held-out loss beside that of a Kneser-Ney 5-gram on the same tokens.

    python simulations/benchmarks/ngram.py models/dialogues-llm public_dialogues.parquet

Both read the same training lines through the same tokenizer (the model for several passes, in few-shot blocks) and are
measured on the same held-out lines, each by itself, the end mark included. Options are as for `fedsynth pretrain`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class KneserNey:
    """Interpolated Kneser-Ney (Chen and Goodman 1999, section 4.1.6) with one discount per order.

    Args:
        lines: Token ids of each line, its end mark included.
        vocabulary: Number of tokens; vocabulary + 1 (one mark for the start of a line) to the power of `order` must
            fit into 63 bits.
        order: Longest n-gram.
    """

    def __init__(self, lines: list[list[int]], vocabulary: int, order: int = 5):
        self.order, self.base, self.vocabulary = order, vocabulary + 1, vocabulary
        if self.base**order >= 1 << 63:
            raise ValueError(f"{order}-grams over {vocabulary} tokens do not fit into 63 bits: use a lower order")
        grams, counts = np.unique(self._windows(lines), return_counts=True)
        # Order by order downwards: an n-gram of a lower order counts the different tokens that stand before it.
        self.tables: list[tuple[Ids, Ids]] = [(grams, counts)]
        for n in range(order - 1, 0, -1):
            grams, counts = np.unique(self.tables[0][0] % self.base**n, return_counts=True)
            self.tables.insert(0, (grams, counts))
        self.contexts = []
        for grams, counts in self.tables:
            heads, where = np.unique(grams // self.base, return_inverse=True)
            self.contexts.append((heads, np.bincount(where, counts), np.bincount(where)))
        ones = [[int((counts == k).sum()) for k in (1, 2)] for _, counts in self.tables]
        # The usual estimate; where it is 0 (nothing seen once) unseen tokens would get no mass at all.
        self.discounts = [n1 / (n1 + 2 * n2) if n1 else 0.5 for n1, n2 in ones]

    def _windows(self, lines: list[list[int]]) -> Ids:
        """Each token with the `order - 1` before it, as one number; lines begin with start marks."""
        start = [self.vocabulary] * (self.order - 1)
        stream = np.concatenate([[*start, *line] for line in lines]).astype(np.int64)
        wanted = np.concatenate([[False] * len(start) + [True] * len(line) for line in lines])
        number = np.zeros(len(stream), np.int64)
        for back in range(self.order):
            number[back:] += stream[: len(stream) - back] * self.base**back
        return number[wanted]

    def probabilities(self, windows: Ids) -> NDArray[np.float64]:
        """P(last token | those before it) of each window."""
        found = np.full(len(windows), 1 / self.vocabulary)
        for n, ((grams, counts), (heads, totals, kinds), d) in enumerate(
            zip(self.tables, self.contexts, self.discounts, strict=True), start=1
        ):
            gram = windows % self.base**n
            count = _look_up(grams, counts, gram)
            total, kind = _look_up(heads, totals, gram // self.base), _look_up(heads, kinds, gram // self.base)
            seen = total > 0
            mixed = (np.maximum(count - d, 0) + d * kind * found) / np.where(seen, total, 1)
            found = np.where(seen, mixed, found)
        return found

    def nats_per_token(self, lines: list[list[int]]) -> float:
        """Mean negative log-likelihood."""
        return float(-np.log(self.probabilities(self._windows(lines))).mean())


def _look_up(keys: Ids, values: NDArray[np.float64] | Ids, wanted: Ids) -> NDArray[np.float64]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)


def main() -> None:
    from transformers import AutoTokenizer

    from fedsynth.models.encoding import prompt_rows
    from fedsynth.pretraining.public_text import PublicText, read

    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("model", type=Path, nargs="?", default=Path("models/dialogues-llm"))
    ask.add_argument("corpus", nargs="?", default="public_dialogues.parquet")
    ask.add_argument("--text", default="text")
    ask.add_argument("--topic", default="intent", help="none: --topic ''")
    ask.add_argument("--held-out", default="split=test")
    asked = ask.parse_args()
    if not (asked.model / "card.json").is_file():
        print(f"no model in {asked.model}: make it first with fedsynth pretrain")
        return
    column, _, value = asked.held_out.partition("=")
    card = json.loads((asked.model / "card.json").read_text())
    seed = card["wanted"]["seed"]
    held_out = (column, value) if column else None
    learn, held = read(PublicText(asked.corpus, asked.text, asked.topic or None, held_out), seed)
    if learn.digest() != card["corpus"]["sha256"]:
        raise SystemExit(f"{asked.model} was trained on another text than this: give the options of its card")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    started = time.perf_counter()
    rows = [prompt_rows(tokenizer, [f" {t}\n" for t in part.texts]) for part in (learn, held)]
    found = KneserNey(rows[0], len(tokenizer)).nats_per_token(rows[1])
    print(f"held out: {len(rows[1]):,} texts, {sum(map(len, rows[1])):,} tokens")
    print(f"5-gram, interpolated Kneser-Ney: {found:.3f} nats per token ({time.perf_counter() - started:.0f} s)")
    print(f"{asked.model.name}: {card['held_out']['nats_per_token']:.3f} nats per token ({card['seconds']} s)")


if __name__ == "__main__":
    main()
