"""Losses of an arm's drafts and texts to filters, if they are so large that a report must name them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

FUNNELS = {"drafts": "drafts", "written": "written texts", "self-generated": "records of the clients' own"}
FEW = 0.1  # share of the requested texts: if filters leave less, a figure of the arm says little about its method


def begins(step: str, before: int, left: int) -> bool:
    """True if a step is the first of a funnel: it has a model's texts, or others than those of the step before it."""
    return step in FUNNELS or before != left


@dataclass(frozen=True)
class Loss:
    """A loss to filters that leaves an arm few drafts or texts, a client without text, or labels without text.

    Attributes:
        what: The funnel's first step.
        asked: Requested texts of all clients, rounds and seeds.
        left: Texts left after the funnel's last step.
        taken: Texts that filters dropped; those that a step was told to leave out do not count.
        reason: The most frequent reason among these, or, if there are none, among all; "" if nothing was dropped.
        most: Texts dropped for that reason.
        clients: Clients for which texts were requested; 0 if the server writes for all.
        bare: Clients without any text left in some round.
        narrowed: Clients without any text left of some label that they had (the server counts, too).
    """

    what: str
    asked: int
    left: int
    taken: int
    reason: str
    most: int
    clients: int
    bare: int
    narrowed: int

    @property
    def few(self) -> bool:
        """True if so little is left that the arm's figures do not show its method."""
        return self.left == 0 or self.asked - self.taken < FEW * self.asked

    @property
    def words(self) -> str:
        """The text of the report, with the names of numbers in braces."""
        name, reason = (
            text.replace("{", "{{").replace("}", "}}")
            for text in (FUNNELS.get(self.what, self.what.replace("_", " ")), self.reason)
        )
        said = "{left} of {asked} " + name + " left" + (f" ({reason} {{most}})" if reason else "")
        if self.left and self.bare:
            said += ", none at {bare} of {clients} clients"
        if self.left and self.narrowed:
            said += ", labels lost" + (" at {narrowed} of {clients} clients" if self.clients else "")
        return said

    def __str__(self) -> str:
        return self.words.format(**vars(self))


def losses(frame: pd.DataFrame) -> dict[str, list[Loss]]:
    """The losses of each arm's funnels; arms without a loss are left out.

    Args:
        frame: Tidy metrics.
    """
    rows = frame[frame["metric"].astype(str).str.startswith("yield/")]
    parts = rows["metric"].str.split("/", n=3, expand=True).reindex(columns=range(4))
    rows = rows.assign(step=parts[1], what=parts[2], reason=parts[3])
    found: dict[str, list[Loss]] = {}
    for arm, own in rows.groupby("arm", sort=False):
        funnels: list[list[str]] = []
        last = -1
        for step, of_step in own.groupby("step", sort=False):
            before, after = (int(of_step.loc[of_step["what"] == what, "value"].sum()) for what in ("in", "kept"))
            if begins(str(step), before, last):
                funnels.append([])
            funnels[-1].append(str(step))
            last = after
        told = [_loss(own[own["step"].isin(steps)], steps[0]) for steps in funnels]
        if kept := [loss for loss in told if loss is not None]:
            found[str(arm)] = kept
    return found


def _loss(rows: pd.DataFrame, first: str) -> Loss | None:
    """The loss of one funnel of an arm."""
    asked = int(rows.loc[(rows["step"] == first) & (rows["what"] == "in"), "value"].sum())
    # Rows are in the order of the steps: a client's last row has the texts left.
    left = rows[rows["what"] == "kept"].groupby(["seed", "round", "client"], sort=False)["value"].last()
    by_reason = rows[rows["what"] == "dropped"].groupby("reason", sort=False)["value"].sum()
    taken = by_reason[~by_reason.index.astype(str).str.startswith("beyond")]  # such a step drops what it was told to
    named = by_reason if taken.empty else taken
    lost = rows[(rows["what"] == "labels_lost") & (rows["value"] > 0)]
    clients = {client for _, _, client in left.index if client >= 0}  # the server's number is below 0
    loss = Loss(
        what=first,
        asked=asked,
        left=int(left.sum()),
        taken=int(taken.sum()),
        reason="" if named.empty else str(named.idxmax()),
        most=0 if named.empty else int(named.max()),
        clients=len(clients),
        bare=len({client for _, _, client in left[left == 0].index} & clients),
        narrowed=lost["client"].nunique(),
    )
    return loss if asked and (loss.few or loss.bare or loss.narrowed) else None
