"""Findings about gathered rows, for a site's operator: faults that forbid their use, and other misfits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedsynth.corpus import same
from fedsynth.data.partition import ClientData, nearest, overlaps, unified
from fedsynth.data.sources import Gathered, SiteData, laid_out, units_of
from fedsynth.data.tables import misfit_values

NAMED = 5  # labels, persons or splits in a message
TOLD = 10  # rows in a message
MANY = 20  # rows: who has more of them, and ten times as many as half of all persons have, may be no person


def misread(data: SiteData, found: Gathered) -> str:
    """Why rows must not be used as they are: persons of several spellings, unless `data.spellings` merges them; ""
    if they may be. Invisible characters of a spelling are escaped."""
    if not found.spelt or data.spellings == "merge":
        return ""
    named = ", ".join(" and ".join(map(ascii, group)) for group in found.spelt[:NAMED])
    more = f", and {len(found.spelt) - NAMED} more" if len(found.spelt) > NAMED else ""
    return (
        f"{data.origin}: {len(found.spelt)} persons of the column {data.person!r} are written in several ways: {named}"
        f'{more}; write each person one way, or say data.spellings = "merge"'
    )


def warnings(data: SiteData, found: Gathered) -> list[str]:
    """Rows that do not fit and can be used, a line each, for the site alone: the lines name labels and counts."""
    name, site = data.origin, laid_out(found.records, data)
    answer = data.columns.answer
    said = [f"{name}: {note}" for note in found.notes]
    if found.damaged:
        said.append(
            f"{name}: {len(found.damaged)} of {found.rows} rows cannot be read and are empty ones in their places: "
            f"{_notice(found.counted, found.damaged)}{_way_out(found.damaged)}"
        )
    if found.incomplete:
        said.append(
            f"{name}: {len(found.incomplete)} of {found.rows} rows lack a text, {answer} or person and are empty ones: "
            f"{_notice(found.counted, found.incomplete)}"
        )
    if found.spelt:
        said.append(f"{len(found.spelt)} persons are written in several ways, and each counts as one (data.spellings)")
    texts = [record.text for record in found.records if record.text]
    if texts and all(map(_is_number, texts)):
        said.append(f"column {data.columns.texts[0]!r} holds numbers alone: is it the text's column?")
    if data.labels:
        said += _labels(data, found)
    for place, column in enumerate(data.columns.attributes):
        values = [record.attributes[place] for record in found.records if record.text and not record.held]
        said += misfit_values(column, values, data.attributes[column], f"data.attributes.{column}")
    if data.test is not None:
        said += _test_rows(data, found, len(site.test))
    said += _units(data, found, site)
    usable = [text for text in site.train.prompts if text]
    if repeated := len(usable) - len(set(unified(usable))):
        said.append(
            f"{repeated} training rows repeat the text of another one: if they are of one person, give them one value "
            "in a column of persons, or leave them out"
        )
    if both := overlaps([site])[1]:
        said.append(f"{both} texts are training text and test text: measured on them, a model looks too good")
    return said


def _notice(counted: str, rows: Sequence[tuple[int, str]]) -> str:
    named = ", ".join(f"{counted} {number} ({why})" for number, why in rows[:TOLD])
    return named + (f", and {len(rows) - TOLD} more" if len(rows) > TOLD else "")


def _way_out(rows: Sequence[tuple[int, str]]) -> str:
    return "; save it as UTF-8" if any("UTF-8" in why for _, why in rows) else ""


def _labels(data: SiteData, found: Gathered) -> list[str]:
    said = []
    rows = Counter(record.answer for record in found.records if record.text)
    listed = {same(label) for label in data.labels}
    other = {label: count for label, count in rows.items() if label not in data.labels}
    if respelt := [label for label in other if same(label) in listed]:
        named = ", ".join(map(ascii, respelt[:NAMED])) + (", ..." if len(respelt) > NAMED else "")
        said.append(
            f"{sum(other[label] for label in respelt)} rows have a label of data.labels in another spelling ({named}): "
            "they count as that label"
        )
    if unknown := Counter({label: count for label, count in other.items() if same(label) not in listed}):
        named = ", ".join(
            f"{label!r} {count}{nearest(label, data.labels)}" for label, count in unknown.most_common(NAMED)
        )
        named += ", ..." if len(unknown) > NAMED else ""
        said.append(
            f"{unknown.total()} rows have a label that data.labels lacks ({named}): they count as records, and nothing "
            "is learnt from them"
        )
    there = {same(label) for label in rows}
    if absent := [label for label in data.labels if same(label) not in there]:
        said.append(f"no row has the label {', '.join(map(repr, absent))} of data.labels")
    return said


def _test_rows(data: SiteData, found: Gathered, count: int) -> list[str]:
    assert data.test is not None
    if not count:
        known = ", ".join(map(repr, found.splits[:NAMED])) or "no value"
        return [
            f"no row to test on: none that can be read has {data.test.equals!r} in the test column "
            f"{data.test.column!r}; it has {known}"
        ]
    train = units_of(found.records)
    if data.person and (both := len({record.unit for record in found.records if record.held} & set(train))):
        return [f"{both} values of {data.person!r} have training and test rows: a person belongs in one of the two"]
    return []


def _units(data: SiteData, found: Gathered, site: ClientData) -> list[str]:
    said = []
    unit, units = f"values of {data.person!r}" if data.person else "rows", units_of(found.records)
    if len(units) > data.records:
        said.append(
            f"the training text has {len(units)} {unit}, declared are {data.records} (data.records): only the first "
            f"{data.records} take part. If one of them is taken out of the source, or damaged so that nobody can tell "
            "whose row it is, the next one moves in, so that this costs the replace-one figure; epsilon holds for one "
            "that stays and is emptied"
        )
    elif len(units) < data.records:
        said.append(
            f"the training text has {len(units)} {unit}, declared are {data.records} (data.records): those that are "
            "missing count as empty ones"
        )
    sizes = sorted(units.values())
    if sizes and sizes[-1] > max(MANY, 10 * sizes[len(sizes) // 2]):
        said.append(
            f"one of the {unit} has {sizes[-1]} of {len(site.train)} training rows, half of them have at most "
            f"{sizes[len(sizes) // 2]}: is it a person, or does it stand for unknown ones?"
        )
    return said


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
