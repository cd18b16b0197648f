"""The costs of 100,000 rows and of 200 clients: seconds and memory. No limit is asserted here.

    python simulations/benchmarks/sizes.py [--rows 100000] [--clients 200]

Corpora: one payload of column bytes through seal, message, unpack, the server's check, and every step of curation, with
random embeddings around 5,000 centres. Clients: one round of FDKT among simulated hospitals, each with five DP steps
and eight drafts. Memory is the resident set of each kind of process, read from outside twice a second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil

import fedsynth
from fedsynth.corpus import Corpus, Provenance
from fedsynth.federation.messages import Synthesize, Synthesized
from fedsynth.federation.records import pack_reply, seal, unpack_reply
from fedsynth.federation.validation import check_reply
from fedsynth.privacy.statement import statement
from fedsynth.scenario.toml import load
from fedsynth.synthesis.curation import balance, clusters, deduplicate, well_formed

T = TypeVar("T")
LABELS = tuple(f"label_{i}" for i in range(77))
WORDS = np.array([f"word{i}" for i in range(3000)])


def corpora(rows: int, width: int = 192) -> None:
    """One corpus of released text from a client's seal to the server's clusters."""
    rng = np.random.default_rng(0)
    texts = tuple(" ".join(row) for row in WORDS[rng.integers(0, len(WORDS), (rows, 12))])
    answers = tuple(LABELS[i % len(LABELS)] for i in range(rows))
    corpus = Corpus(texts, answers, Provenance.SELF_GENERATED)
    centres = rng.normal(size=(5000, width))
    places = centres[rng.integers(0, len(centres), rows)] + 0.5 * rng.normal(size=(rows, width))
    said = statement(None, simulated=True)
    request = Synthesize(per_label=rows, max_new_tokens=48, temperature=1.0, top_p=0.95, seed=0)

    def timed(name: str, work: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        took = f"{time.perf_counter() - wall:7.2f} s ({time.process_time() - cpu:6.2f} s CPU)"
        print(f"  {name:<22}{took}   {psutil.Process().memory_info().rss / 1e6:6.0f} MB resident", flush=True)
        return found

    print(f"{rows:,} rows, {len(LABELS)} labels, {sum(map(len, texts)) / 1e6:.1f} million characters")
    data = timed("seal", lambda: seal(Synthesized(corpus, said, 0), allowed=("text",), waived=True))
    message = timed("message", lambda: pack_reply(data))
    print(f"  payload: {len(data) / 1e6:.1f} MB, {len(data) / rows:.0f} bytes a row")
    answer = timed("unpack", lambda: unpack_reply(message, Synthesized))
    assert isinstance(answer, Synthesized)
    assert answer.corpus == corpus
    timed("the server's check", lambda: check_reply(request, answer, LABELS))
    formed = timed("well formed", lambda: well_formed(answer.corpus, labels=LABELS, min_words=4))
    unique = timed("deduplicate", lambda: deduplicate(formed.corpus))
    timed("balance", lambda: balance(unique.corpus, per_label=100, seed=0))
    groups = timed("clusters of 4", lambda: clusters(places.astype(np.float32), size=4, seed=0))
    print(f"  {len(groups):,} clusters, the largest of {max(map(len, groups))}")


class Memory(threading.Thread):
    """The largest resident set of each kind of process below this one."""

    KINDS = (
        ("ray::", "workers, each"),
        ("raylet", "ray"),
        ("gcs_server", "ray"),
        ("flwr-serverapp", "server app"),
        ("superlink", "SuperLink"),
        ("flwr-simulation", "driver"),
    )

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, float] = defaultdict(float)
        self.now: dict[str, float] = {}
        self.over = threading.Event()

    def run(self) -> None:
        """Looks until `over` is set."""
        while not self.over.wait(0.5):
            now: dict[str, float] = defaultdict(float)
            for process in psutil.Process().children(recursive=True):
                try:
                    line, rss = " ".join(process.cmdline()), process.memory_info().rss / 1e6
                except psutil.Error:
                    continue
                kind = next((kind for mark, kind in self.KINDS if mark in line), "others, each")
                self.most[kind] = max(self.most[kind], rss)
                now[kind] += rss
            self.now = now


def many_clients(clients: int) -> None:
    """One round of FDKT among `clients` simulated hospitals."""
    scenario = load(
        "hospitals",
        [
            f"data.clients={clients}",
            "data.train_per_client=40",
            "data.test_per_client=40",
            "seeds=[0]",
            'run=["fdkt"]',
            "client.generator_training={ expected_batch = 10, steps = 5 }",
            "strategy.per_label=1",
            "strategy.num_texts=16",
            "client.max_noise_multiplier=50",
            "client.task_training={ augmented_epochs = 1, private_epochs = 1 }",
        ],
    )
    seen = {"synthesize": 0}

    def watch(event: dict[str, object]) -> None:
        if event.get("phase") == "synthesize":
            seen["synthesize"] = max(seen["synthesize"], int(str(event["done"])))

    watcher = Memory()
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = fedsynth.run(scenario, out=Path(folder) / "run", on_event=watch)
        whole = time.perf_counter() - started
        drafts = result.corpora("fdkt", 0, "drafts")
        cell = float(result.metrics.query("metric == 'seconds/cell'")["value"].iloc[0])
    watcher.over.set()
    fewest = min(map(len, drafts.values()))
    print(
        f"{clients} clients, one round: {whole:.0f} s in all, {cell:.0f} s in the round on {os.cpu_count()} cores: "
        f"{cell / clients:.2f} s per client"
    )
    print(f"  DP steps each: 5; released texts of the client with fewest: {fewest}; answers: {len(drafts)}")
    print(f"  epsilon {result.summary['arms']['fdkt']['epsilon']:.3f}")
    for kind, megabytes in sorted(watcher.most.items()):
        print(f"  {kind:<14} {megabytes:6.0f} MB resident at most")


def main() -> None:
    """All of it, or what is asked for."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--rows", type=int, default=100_000)
    ask.add_argument("--clients", type=int, default=200)
    asked = ask.parse_args()
    if asked.rows:
        corpora(asked.rows)
    if asked.clients:
        many_clients(asked.clients)


if __name__ == "__main__":
    main()
