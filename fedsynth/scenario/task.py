"""What a scenario says of its task in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsynth.scenario.schema import Scenario


def wordings(scenario: Scenario, labels: Sequence[str]) -> dict[str, str]:  # noqa: ARG001 - says nothing of them yet
    """Each label as a person would say it.

    Args:
        scenario: Resolved.
        labels: The public label list, which a scenario may leave to its source.
    """
    return {label: in_words(label) for label in labels}


def in_words(name: str) -> str:
    """A name with its words parted.

    >>> in_words("activate_my_card")
    'activate my card'
    """
    return " ".join(re.sub(r"[_-]", " ", name).split()) or name
