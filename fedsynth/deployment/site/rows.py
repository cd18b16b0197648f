"""A site's rows: imported by its operator before any request uses them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from fedsynth.data import rowstore
from fedsynth.data.findings import misread, warnings
from fedsynth.data.rowstore import Imported, Record, RowsUnusable, source_mac
from fedsynth.data.sources import Gathered, gathered, units_of
from fedsynth.deployment.policy import Place
from fedsynth.deployment.site.ready import Finding, check_account
from fedsynth.privacy.ledger import Ledger
from fedsynth.privacy.ledger_file import LedgerUnusable
from fedsynth.privacy.plan import DPPlan, composed_epsilon
from fedsynth.typed import BadValue


def import_rows(place: Place) -> Iterator[Finding]:
    """Imports the rows that requests use from the source, and reports faulty ones. No row stops it.

    The account is made if the data set never had one.

    Raises:
        BadValue: If nothing was imported: the source or a column is missing, persons are written in several ways, or a
            repeated query gives other rows.
        fedsynth.privacy.ledger_file.LedgerUnusable: If the account cannot be used, whose key protects the rows.
        OSError: If the rows cannot be written.
    """
    data, seen = place.site.data, _stamp(place)
    found = gathered(data, place.folder)
    if data.query and gathered(data, place.folder).records != found.records:
        raise BadValue(
            "data.query gave other rows when it was asked again, and other rows are charged again: let ORDER BY end "
            "with a column that no two rows share, and WHERE leave out what is still being written"
        )
    if problem := misread(data, found):
        raise BadValue(problem)
    check_account(place)
    account = place.open_ledger(create=True)
    mac = "" if data.query else source_mac(account.mac_key, place.path(data.source).read_bytes())
    if _stamp(place) != seen:
        raise BadValue(f"{data.source} was written while it was read: import it again when that is over")
    before = _known(place, account)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rowstore.write(
        place.rows, account.mac_key, Imported(data.digest, now, len(found.records), *seen, mac), found.records
    )
    yield from _findings(place, account, found, before)


def _findings(place: Place, account: Ledger, found: Gathered, before: list[Record] | None) -> Iterator[Finding]:
    data = place.site.data
    yield Finding(
        "data",
        "ok",
        f"{found.rows} rows of {data.source or 'data.query'} imported ({place.rows}); {data.records} records declared, "
        f"unit: {data.unit_name}",
    )
    if not any(record.text and not record.held for record in found.records):
        columns = " and ".join(map(repr, (*data.columns.texts, data.columns.answer)))
        yield Finding(
            "data",
            "problem",
            f"no training row has {columns} that can be read: requests are answered all the "
            "same, and charged, with nothing but noise in them",
        )
    if before is not None and before != list(found.records):
        yield Finding(
            "data",
            "warning",
            "these are other rows than those imported before: a request that was not "
            "answered yet is charged again when it comes again",
        )
    for said in warnings(data, found):
        yield Finding("data", "warning", said)
    if len(units_of(found.records)) > data.records and (figures := replaced(account)):
        yield Finding(
            "data",
            "warning",
            f"what this account has reserved: epsilon {figures[1]:.4g} for one that is "
            f"emptied, {figures[0]:.4g} for one that another one replaces",
        )


def replaced(account: Ledger) -> tuple[float, float] | None:
    """Replace-one and zero-out epsilon of all reservations of an account; None without any, or without a guarantee."""
    rows = [row for row in account.entries() if row["kind"] != "grant"]
    if not rows or any(row["kind"] == "no_guarantee" for row in rows):
        return None
    plans = [DPPlan.from_dict({**row["plan"], "rounds": row["rounds"]}) for row in rows]
    delta = account.spent()[1]
    return composed_epsilon(plans, delta, relation="replace_one"), composed_epsilon(plans, delta)


def check_rows(place: Place) -> None:
    """Checks that the site's rows were imported under the present site.toml and have not been changed.

    Raises:
        BadValue: If not.
    """
    if place.imported is None:
        raise BadValue(
            "no rows have been imported as [data] of site.toml declares them, or by an earlier version "
            f"alone: `fedsynth site check {place.folder}` reads them, and requests work with what it has read"
        )
    try:
        place.open_rows(place.open_ledger())
    except RowsUnusable as problem:
        raise BadValue(str(problem)) from problem


def source_changed(place: Place) -> str:
    """A line, for the site's operator only, if the file has changed since its rows were imported; else "". Queries are
    not repeated."""
    about = place.imported
    if about is None or not place.site.data.source:
        return ""
    path, go_on = place.path(place.site.data.source), f"requests go on with the rows as imported at {about.at}"
    try:
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) == (about.size, about.changed):
            return ""
        if found.st_size == about.size and source_mac(place.open_ledger().mac_key, path.read_bytes()) == about.mac:
            return ""
    except OSError as problem:
        return f"{path} cannot be read ({problem.strerror}): {go_on}"
    except LedgerUnusable:  # another check reports it
        return ""
    return f"{path} has changed: {go_on}, until `fedsynth site check` imports it anew"


def _stamp(place: Place) -> tuple[int, int]:
    """Size and time of the file; zeros for a query, and for a missing file."""
    if not place.site.data.source:
        return 0, 0
    try:
        found = place.path(place.site.data.source).stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _known(place: Place, account: Ledger) -> list[Record] | None:
    """The rows imported before under the present site.toml; None if there are none that can be used."""
    try:
        return rowstore.read(place.rows, account.mac_key) if place.imported else None
    except RowsUnusable:
        return None
