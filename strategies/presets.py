"""The values of the papers and of their code, for `strategy.preset = "paper"`; what they leave open stays a default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

_FDKT = {  # arXiv 2405.14212 and its code in FATE
    "draft_temperature": 1.0,
    "draft_top_p": 0.9,
    "draft_top_k": 50,
    "draft_tokens": 256,
    "judge": "instruction",
    "judge_tokens": 1024,  # our choice: room for thoughts
    "cluster_size": 4,
    "keep": 4,  # all of a cluster that the judge selects
    "demonstrations": "all_labels",
    "shots": 2,
    "temperature": 0.8,
    "top_p": 0.9,
    "max_new_tokens": 4096,
}
_KNOWLEDGE_SG = {  # arXiv 2410.05725 and its code
    "temperature": 0.7,
    "top_p": 1.0,
    "max_new_tokens": 2048,
    "judge": "instruction",
    "response_tokens": 2048,
    "start_from": "dp",
    "loss_on": "response",
}
_FEDPIT = {"share": 0.5, "candidates": 32, "keep": 16, "shots": 8}  # arXiv 2403.06131

Presets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Name -> options."""

FDKT: Presets = {"paper": _FDKT}
KNOWLEDGE_SG: Presets = {"paper": _KNOWLEDGE_SG}
FEDPIT: Presets = {"paper": _FEDPIT}
