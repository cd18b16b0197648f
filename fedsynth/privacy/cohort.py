"""The clients of a secure sum: how many there are, how many may be missing or collude, and what that makes of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedsynth.limits import least, most
from fedsynth.privacy.rdp import bound
from fedsynth.privacy.skellam import sigma_of, variance
from fedsynth.typed import BadValue, in_range

SMALLEST, LARGEST = 3, 256  # of two, each reads the other's vector off the sum; work and messages grow with the square


@dataclass(frozen=True)
class Cohort:
    """The declared cohort of a secure sum. The same table stands in scenarios and in statements.

    Attributes:
        clients: Number of clients that are asked to take part, K.
        dropouts: So many of them may be missing in the end. With more the sum is not opened.
        colluders: So many of the others may tell the server their secrets and their noise. It is an assumption.
    """

    clients: Annotated[int, least(SMALLEST), most(LARGEST)]
    dropouts: Annotated[int, least(0)] = 0
    colluders: Annotated[int, least(0)] = 0

    def __post_init__(self) -> None:
        in_range(self, "secure_sum")
        if self.threshold > self.least:
            raise BadValue(
                f"secure_sum: {self.threshold} of {self.clients} clients must stay to the end if {self.colluders} may "
                f"collude, and dropouts = {self.dropouts} leaves {self.least}: allow fewer, or ask more clients"
            )

    @property
    def threshold(self) -> int:
        """The number of clients that open a sum, t: more than half of K + colluders.

        An honest client signs one list of survivors, a colluder any. Two lists with t signatures each would take 2t
        signatures, and there are K + colluders at most. So one list is opened, no more (Bonawitz et al. 2017, section
        6.2).
        """
        return (self.clients + self.colluders) // 2 + 1

    @property
    def least(self) -> int:
        """The least number of survivors: fewer hold less noise than planned."""
        return self.clients - self.dropouts

    @property
    def honest(self) -> int:
        """The number of clients whose noise is counted on."""
        return self.least - self.colluders

    def share(self, sigma: float) -> float:
        """The variance of one client's noise, so that `honest` of them cost no more than Gaussian noise of `sigma`."""
        return variance(sigma) / self.honest

    def alone(self, sigma: float, steps: int, delta: float) -> float:
        """Epsilon at delta of one client's own messages, if the server could read them without the sum."""
        return bound([(1.0, sigma_of(self.share(sigma)), steps)], delta)
