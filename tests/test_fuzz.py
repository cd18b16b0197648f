"""Broken bytes of other parties lead to named errors, soon: a tenth of what `make fuzz` tries at night."""

from __future__ import annotations

import pytest
from fuzz import SHARE, Target, targets, tried

INPUTS = 10_000  # of all readers together


@pytest.mark.parametrize("name", targets())
def test_a_reader_answers_broken_bytes_with_a_named_error(name: str) -> None:
    target = targets()[name]
    for seed in target.seeds:
        target.read(seed)
    total = sum(SHARE.get(each, 1.0) for each in targets())
    count = round(INPUTS * SHARE.get(name, 1.0) / total)
    result = tried(target, target.inputs(count, seed=1))
    assert result.faults == []
    assert result.count == count
    assert sum(result.refused.values()) > count / 4  # they are broken


def test_a_reader_that_stumbles_or_takes_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumbles(data: bytes) -> None:
        if b"1" * 5000 in data:
            int(data)
        if data.startswith(b"\x00"):
            raise MemoryError
        raise KeyError("named")

    target = Target([b"0123456789" * 3], stumbles, (KeyError,))
    faults = {why.partition(":")[0] for why, _ in tried(target, target.inputs(2000, seed=0)).faults}
    assert faults == {"ValueError", "MemoryError"}
    monkeypatch.setattr("fuzz.SECONDS", 0.0)
    assert any(why.endswith(" s") for why, _ in tried(target, [b"a"]).faults)


def test_inputs_follow_from_the_seed() -> None:
    target = targets()["payload"]
    assert target.inputs(20, 1) == target.inputs(20, 1) != target.inputs(20, 2)
