from __future__ import annotations

import ast
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fedsynth
from fedsynth.corpus import Corpus, Provenance, Scores
from fedsynth.lora import Adapter
from fedsynth.privacy.caps import Account
from fedsynth.privacy.ledger import Binding, Grant, Ledger
from fedsynth.privacy.plan import DPPlan
from fedsynth.privacy.release import (
    DPTrained,
    NotReleasable,
    Trained,
    release,
    release_scores,
    release_without_guarantee,
)
from fedsynth.scenario.task import NO_CARD

PLAN = DPPlan(400, 50, 60, 1, 1.0, 0.928, 1e-5)
GRANT = Grant("0f" * 16, 1, PLAN, Binding("order", PLAN.digest(), "data", "model", "0.1"))
RECEIPT = DPTrained("the model", PLAN, GRANT, steps_run=60)


def test_released_text_carries_its_grant() -> None:
    corpus = release(RECEIPT, ["p", "q"], ["a", "b"])
    assert corpus.provenance is Provenance.DP_SYNTHETIC
    assert corpus.grants == (GRANT.id,)
    assert (corpus.prompts, corpus.answers) == (("p", "q"), ("a", "b"))


@pytest.mark.parametrize("steps", [0, 59, 61])
def test_other_steps_than_planned_are_not_released(steps: int) -> None:
    with pytest.raises(NotReleasable, match=f"60 steps, {steps} ran"):
        release(replace(RECEIPT, steps_run=steps), ["p"], ["a"])


def test_another_plan_than_paid_for_is_not_released() -> None:
    with pytest.raises(NotReleasable, match="paid for"):
        release(replace(RECEIPT, plan=replace(PLAN, noise_multiplier=0.1)), ["p"], ["a"])


def test_only_a_receipt_is_released() -> None:
    imitation: Any = type("Imitation", (), {"plan": PLAN, "grant": GRANT, "steps_run": 60})()
    for other in (Trained("model", "FedPIT"), imitation, None):
        with pytest.raises(NotReleasable, match="DPTrained"):
            release(other, ["p"], ["a"])


def test_release_without_guarantee_is_charged_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("ward", None))
    trained = Trained("model", "no budget")
    text = Corpus(("p",), ("a",), Provenance.SELF_GENERATED, grants=("stolen",))
    with pytest.raises(NotReleasable, match="without a privacy guarantee"):
        release_without_guarantee(trained, text, ledger, "run", "FedPIT arm", allowed=False)
    assert ledger.entries() == []
    with caplog.at_level(logging.WARNING):
        corpus = release_without_guarantee(trained, text, ledger, "run", "FedPIT arm", allowed=True)
    assert corpus.provenance is Provenance.SELF_GENERATED
    assert corpus.grants == ()
    assert "FedPIT arm" in caplog.text
    assert ledger.spent()[0] == math.inf
    assert "FedPIT arm" in ledger.entries()[0]["reason"]
    with pytest.raises(NotReleasable, match="self-generated"):
        release_without_guarantee(
            trained, replace(text, provenance=Provenance.PUBLIC), ledger, "run", "x", allowed=True
        )
    with pytest.raises(NotReleasable, match="Trained"):
        release_without_guarantee(RECEIPT, text, ledger, "run", "x", allowed=True)
    with pytest.raises(ValueError, match="reason"):
        release_without_guarantee(replace(trained, reason=""), text, ledger, "run", "", allowed=True)


def test_weights_and_scores_without_guarantee_lose_their_grants(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", Account("ward", None))
    trained = Trained("model", "no budget")
    weights = Adapter({"a": np.ones((1, 2), np.float32)}, 1, 2.0, "base", grants=("stolen",))
    for value in (weights, Scores((0.5,), grants=("stolen",))):
        assert release_without_guarantee(trained, value, ledger, "run", "FedIT", allowed=True).grants == ()
    assert [entry["reason"] for entry in ledger.entries()] == ["FedIT (model: no budget)"]


def test_released_scores_carry_their_grant() -> None:
    assert release_scores(RECEIPT, [0.25, 0.5]) == Scores((0.25, 0.5), grants=(GRANT.id,))
    with pytest.raises(NotReleasable, match="DPTrained"):
        release_scores(Trained("model", "raw"), [0.5])


def launders(source: str) -> list[int]:
    """Lines that use the releasable provenance other than to compare with it."""
    lines: list[int] = []

    def visit(node: ast.AST, compared: bool) -> None:
        compared = compared or isinstance(node, ast.Compare | ast.pattern)
        named = isinstance(node, ast.Attribute) and node.attr == "DP_SYNTHETIC"
        spelled = isinstance(node, ast.Constant) and node.value in ("dp_synthetic", "DP_SYNTHETIC")
        if (named or spelled) and not compared:
            lines.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            # What is called inside a comparison is used, not compared.
            visit(child, compared and not isinstance(child, ast.Call | ast.Lambda | ast.NamedExpr))

    visit(ast.parse(source), False)
    return lines


@pytest.mark.parametrize(
    "bad",
    [
        "c = Corpus((), (), Provenance.DP_SYNTHETIC)",
        "kind = corpus.Provenance.DP_SYNTHETIC",
        "c = replace(c, provenance=Provenance('dp_synthetic'))",
        "c = replace(c, provenance=Provenance['DP_SYNTHETIC'])",
        "c = replace(c, provenance=getattr(Provenance, 'DP_SYNTHETIC'))",
        "ok = f(Provenance.DP_SYNTHETIC) == 1",
        "ok = (k := Provenance.DP_SYNTHETIC) is None",
    ],
)
def test_the_search_finds_laundering(bad: str) -> None:
    assert launders(bad) == [1]


@pytest.mark.parametrize(
    "good",
    [
        "ok = c.provenance is Provenance.DP_SYNTHETIC",
        "ok = c.provenance in (Provenance.PUBLIC, Provenance.DP_SYNTHETIC)",
        "match kind:\n    case Provenance.DP_SYNTHETIC: pass",
    ],
)
def test_the_search_lets_comparisons_pass(good: str) -> None:
    assert launders(good) == []


def test_text_becomes_releasable_in_one_file_only() -> None:
    root = Path(fedsynth.__file__).parent
    allowed = {root / "privacy" / "release.py": 1, root / "corpus.py": 1}  # corpus.py: the enumeration's own value
    folders = [root, root.parent / "strategies", root.parent / "clients", root.parent / "simulations"]
    files = {path for folder in folders for path in folder.rglob("*.py")}
    assert set(allowed) <= files
    for path in sorted(files):
        lines = launders(path.read_text())
        assert len(lines) == allowed.get(path, 0), f"{path} sets DP_SYNTHETIC in lines {lines}: use privacy.release"


def test_a_sample_of_more_characters_than_a_text_may_have_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsynth.clients import synthesize as module
    from fedsynth.federation.messages import Synthesize, Synthesized
    from fedsynth.federation.validation import check_reply
    from fedsynth.limits import MAX_TEXT
    from fedsynth.privacy.statement import Statement

    class Writer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def complete(self, prompts: Sequence[str], *_: Any, **__: Any) -> list[str]:
            return [" fine", "x" * (MAX_TEXT + 1), "y" * MAX_TEXT, " cut"][: len(prompts)]

    monkeypatch.setattr(module, "LocalLLM", Writer)
    monkeypatch.setattr(module, "on_base", lambda *_: SimpleNamespace(eval=lambda: None))
    monkeypatch.setattr(module, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(module, "text_rows", lambda _, texts: [[0] * (9 if text == " cut" else 3) for text in texts])
    config, rules = SimpleNamespace(generator="none"), SimpleNamespace(identifiers=frozenset())
    client: Any = SimpleNamespace(labels=("a", "b"), config=config, task=NO_CARD, rules=rules)
    order, adapter = Synthesize(2, 1.0, 1.0, 9, 1), None
    texts, labels, unfinished = module._sample(client, adapter, order)
    assert ([len(text) for text in texts], labels, unfinished) == ([4, MAX_TEXT], ("a", "b"), 2)
    sent = Corpus(tuple(texts), tuple(labels), Provenance.SELF_GENERATED)
    check_reply(order, Synthesized(sent, Statement("none", None, 1e-5), unfinished), client.labels)
