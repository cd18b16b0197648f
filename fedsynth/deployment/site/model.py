"""`fedsynth site model`: measures the models that runs left at a site on its test rows, and applies them to texts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from fedsynth.clients.client_side import ClientSide
from fedsynth.clients.evaluate import answers, evaluate
from fedsynth.clients.local_model import LocalModel, all_kept
from fedsynth.data.loaders import load_columns
from fedsynth.deployment.policy import Place
from fedsynth.deployment.site.rows import check_rows
from fedsynth.models.hub import weights_hash
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.typed import BadValue


@dataclass(frozen=True)
class Measured:
    """A model on the site's own test rows.

    Attributes:
        run: Id of the run that left it.
        learnt: Time of the training, UTC.
        metrics: Figures by name; empty without test rows.
        test_rows: Number of test rows.
        problem: The reason why it cannot be measured.
    """

    run: str
    learnt: str
    metrics: dict[str, float]
    test_rows: int
    problem: str = ""


def models(place: Place, run: str = "") -> tuple[list[tuple[Path, LocalModel]], list[str]]:
    """The models that runs left, oldest first, and a line for each that cannot be read.

    Args:
        place: The site.
        run: The beginning of the run's id; empty for any.

    Raises:
        BadValue: If there is no model.
    """
    known, unread = all_kept(place.state)
    found = [(folder, kept) for folder, kept in known if kept.run.startswith(run)]
    if not found:
        raise BadValue(
            "; ".join(unread)
            or (
                f"no run {run!r} left a model in {place.state}: `fedsynth site model` without --run lists all"
                if run
                else f"no run has left a model in {place.state} yet"
            )
        )
    return found, unread


def measured(place: Place, folder: Path, kept: LocalModel) -> Measured:
    """A model's figures on the site's test rows; nothing leaves the site."""
    if place.site.data.test is None:
        return Measured(kept.run, kept.learnt, {}, 0)
    try:
        check_rows(place)
        found = evaluate(_client(place, folder, kept))
    except (ValueError, RuntimeError, OSError) as problem:  # an unusable model must not hide the others
        return Measured(kept.run, kept.learnt, {}, 0, str(problem))
    return Measured(kept.run, kept.learnt, dict(found.metrics), found.examples)


def answer_file(place: Place, folder: Path, kept: LocalModel, texts: Path, column: str, out: Path) -> int:
    """Writes a model's answer to each text of a file: one JSON object a line, with `text` and `answer`.

    No CSV: a spreadsheet would take an answer that begins with `=` for a formula, and the model's teachers may have
    intended that.

    Args:
        place: The site.
        folder: Folder of the model.
        kept: Facts of the model.
        texts: File of the texts: CSV, JSONL or Parquet.
        column: Column of the texts.
        out: A new JSONL file, readable for its owner only, as texts may be private.

    Returns:
        Number of texts.

    Raises:
        BadValue: If the texts cannot be read, one or all are missing, or `out` exists or cannot be written.
    """
    if out.suffix.lower() != ".jsonl":
        raise BadValue(f"--out must name a .jsonl file, got {str(out)!r}")
    try:
        found: list[object] = load_columns(texts, [column])[column].tolist()
    except BadValue as problem:
        raise BadValue(f"{texts}: {problem}") from problem
    if not found:
        raise BadValue(f"{texts} has no rows: there is nothing to answer")
    asked = [text for text in found if isinstance(text, str) and text.strip()]
    if len(asked) < len(found):
        row = next(i for i, text in enumerate(found) if not (isinstance(text, str) and text.strip()))
        raise BadValue(f"{texts}: row {row + 1} has no text in column {column!r}; {len(found) - len(asked)} in all")
    client = _client(place, folder, kept)
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # before the work, not after it
    except OSError as problem:
        raise BadValue(f"--out {out}: {problem.strerror}; name a new file") from problem
    try:
        said = answers(client, asked)
    except BaseException:
        out.unlink()
        raise
    with os.fdopen(file, "w", encoding="utf-8") as lines:
        for text, answer in zip(asked, said, strict=True):
            lines.write(json.dumps({"text": text, "answer": answer}, ensure_ascii=False) + "\n")
    return len(asked)


def _client(place: Place, folder: Path, kept: LocalModel) -> ClientSide:
    data, own, config = place.site.data, place.site.models, kept.config
    os.environ |= place.cards  # before PyTorch looks for GPUs
    if own.generator:  # the folder may have moved
        config = replace(config, generator=place.model(own.generator))
    if own.task_model:
        config = replace(config, task_model=place.model(own.task_model))
    base = config.task_model if kept.labels else config.generator
    if weights_hash(base) != kept.base:
        raise BadValue(f"the model of {kept.run} was made from other weights than {base} has now: put those back")
    try:
        ledger = place.open_ledger()
    except LedgerUnusable as problem:
        raise BadValue(f"{problem} (after a new data.id, `fedsynth site start` makes its account first)") from problem
    return ClientSide(
        index=0,
        config=config,
        labels=kept.labels,
        records=data.records,
        rounds=1,
        unit="row" if data.person is None else "person",
        work=folder,
        run=kept.run,
        ledger=ledger,
        open=lambda: place.open_rows(ledger),
        simulated=False,
        task=kept.task,
    )
