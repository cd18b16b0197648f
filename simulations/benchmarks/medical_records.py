"""Public records for the `medquad` scenario: a medical abstract's title asks, its first sentences answer.

    python simulations/benchmarks/medical_records.py medical_records.parquet

The abstracts (medical_abstracts.parquet) come from FEDSYNTH_DATA. Columns of what is written: `text` (the title),
`answer` (the first two sentences after it), `record` (both as a model reads them), `label` and `split` as they were.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from fedsynth.data.places import find
from fedsynth.instructions import record

SENTENCES = 2  # of an answer


def parts(abstract: str) -> tuple[str, str] | None:
    """Title and first sentences of an abstract; None for one that has a title only."""
    title, *rest = re.split(r"(?<=[.?!])\s+", abstract.strip())
    answer = " ".join(rest[:SENTENCES])
    return (title, answer) if answer else None


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("out", type=Path, nargs="?")
    chosen = ask.parse_args()
    if chosen.out is None:
        print("give the file to write: python simulations/benchmarks/medical_records.py medical_records.parquet")
        return
    abstracts = pd.read_parquet(find("medical_abstracts.parquet"))
    rows = [
        (*found, record(*found), row.label, row.split) for row in abstracts.itertuples() if (found := parts(row.text))
    ]
    pd.DataFrame(rows, columns=["text", "answer", "record", "label", "split"]).to_parquet(chosen.out)
    print(f"{chosen.out}: {len(rows)} records of {len(abstracts)} abstracts")


if __name__ == "__main__":
    main()
