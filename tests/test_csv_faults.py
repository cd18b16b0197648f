"""A quote that swallows rows is found, and a text of several lines is none."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from fedsynth.data.csv_faults import Swallowed, separator, swallowed

LABELS = ("billing", "login", "delivery")
SHARED = Path(__file__).parents[2] / "shared" / "data"


def bare(rows: int) -> list[str]:
    """Lines of a file that knows no quotes, its header first."""
    return ["text,label", *(f"message {i} asks about order {7 * i},{LABELS[i % 3]}" for i in range(rows))]


def file(lines: Sequence[str], end: str = "\n") -> str:
    return end.join(lines) + end


def written(rows: Sequence[Sequence[str]], end: str = "\n") -> str:
    """As a CSV writer puts it down: quotes where they are needed."""
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerows(rows)
    return out.getvalue()


# --- Quotes that swallow ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_two_stray_quotes_at_beginnings_are_told_with_line_and_count(end: str) -> None:
    lines = bare(90)
    for row in (11, 26):
        lines[row] = '"' + lines[row]
    assert len(pd.read_csv(io.StringIO(file(lines, end)))) == 75  # what is read without a word
    assert swallowed(file(lines, end)) == [Swallowed(line=12, lines=16, closes=True)]
    assert str(swallowed(file(lines, end))[0]).startswith(
        "a quote in line 12 begins a field and closes in line 27: 16 lines stand in one cell; "
    )


def test_one_stray_quote_never_closes() -> None:
    lines = bare(20)
    lines[5] = '"' + lines[5]
    assert swallowed(file(lines)) == [Swallowed(line=6, lines=16, closes=False)]
    assert "never closes: 16 lines stand" in str(swallowed(file(lines))[0])


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ('"size matters,login', 'it was 5",login'),  # from the beginning of a field to the end of one
        ('message,"login', 'message,login"'),
        ('message,"login', '"message,login'),
        ('"message,login', 'the "urgent" one,login'),
        ('message,"login', 'size 5",login'),  # a row longer than the header
        ('"message,login', 'message,login"'),  # a shorter one
    ],
)
def test_a_quote_is_found_wherever_it_begins_and_closes(first: str, last: str) -> None:
    lines = bare(40)
    lines[10], lines[30] = first, last
    assert swallowed(file(lines)) == [Swallowed(line=11, lines=21, closes=True)]


def test_a_text_in_quotes_that_closes_a_stray_one() -> None:
    lines = bare(40)
    lines[10], lines[30] = '"' + lines[10], '"hello, team",login'
    [found] = swallowed(file(lines))
    assert (found.line, found.lines) == (11, 21)


def test_rows_without_a_list_are_known_by_their_commas() -> None:
    lines = ["text,response", *(f"where is order {i}?,it is on page {i}" for i in range(30))]
    lines[10], lines[20] = '"' + lines[10], lines[20].replace("?", '"')
    assert swallowed(file(lines)) == [Swallowed(line=11, lines=11, closes=True)]


def test_quotes_in_the_header_are_found() -> None:
    lines = bare(9)
    lines[0], lines[4] = '"text,label', lines[4].replace(",", '",')
    assert swallowed(file(lines)) == [Swallowed(line=1, lines=5, closes=True)]


def test_the_line_is_that_of_an_editor() -> None:
    """Texts of several lines and lines with nothing in them come before."""
    rows = written([("text", "label"), ("dear team,\n\nplease, help\n", "billing"), ("a", "login")])
    lines = bare(12)[1:]
    lines[3] = '"' + lines[3]
    lines[7] = '"' + lines[7]
    assert swallowed(rows + "\n" + file(lines)) == [Swallowed(line=11, lines=5, closes=True)]


# --- Texts of several lines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Dear team,\nI write, as ever, about order 3.\nRegards, client 0",
        "Dear team,\nplease call",
        "Aspirin, 100 mg\nMetformin, 500 mg\nRamipril, 5 mg",
        "Plan: continue,\nlogin, billing, delivery\nnothing else",
        'she said "well, no"\nand left, login',
        "one,two\nthree,four\nfive,six",
        "1,000\n2,000\n",
        "\n\n,,,\n,\n",
        "billing,\nlogin,\ndelivery",
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_a_text_of_several_lines_is_no_fault_whatever_its_commas(text: str, where: int) -> None:
    rows = [("text", "label"), *((f"message {i}, of order {i}", LABELS[i % 3]) for i in range(20))]
    rows.insert(7, (text, "login"))
    assert swallowed(written([row[:: 1 - 2 * where] for row in rows])) == []


WORDS = ("reports", "pain,", "fever", "and", "cough;", "denied", "Monday", "3:45", "1,000", "mg", "(left)", "Plan:",
         "aspirin,", "login", "billing,", "none")  # fmt: skip


@pytest.mark.parametrize("one_line", [0, 1, 5])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_where_most_texts_have_lines_with_a_comma_each_that_is_how_texts_are(one_line: int, end: str) -> None:
    texts = [f"Milk,{i}\nbread,two\nrice,three\nsalt,four\nend" for i in range(6)] + ["as ever"] * one_line
    rows = [("text", "label"), *((text, LABELS[i % 3]) for i, text in enumerate(texts))]
    assert swallowed(written(rows, end)) == []
    whole = written(rows, end)
    assert swallowed(whole + '"and one that never closes,a' + end)[-1].closes is False


def test_one_text_alone_with_a_comma_in_each_line_has_nothing_to_be_compared_with() -> None:
    assert swallowed(written([("text", "label"), ("a,b\nc,d\ne,f\ng,h\ni", "login")])) == []


def test_sentences_with_a_comma_each_are_no_rows() -> None:
    rows = [("text", "response"), *((f"where is order {i}?", f"it is on page {i}") for i in range(20))]
    rows[5] = ("Dear team, hello\nthe order, again\nthe parcel, too\nthe van, as ever\nRegards", "it is on its way")
    assert swallowed(written(rows)) == []


def note(rng: random.Random) -> str:
    kind = rng.randrange(4)
    lines = []
    for _ in range(rng.randint(2, 9)):
        prose = " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 8)))
        medicine = f"{rng.choice(['Aspirin', 'Metformin'])}, {rng.randint(1, 500)} mg"
        lines.append((prose, medicine, f"{rng.randint(1, 9)},{rng.randint(100, 999)}", prose + ",")[kind])
    return "\n".join(lines)


def test_notes_at_random_are_no_fault() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        order = [("text", "label"), ("label", "text"), ("id", "text", "label"), ("text", "response")][seed % 4]
        rows = []
        for i in range(rng.randint(1, 40)):
            cells = {"text": note(rng), "response": note(rng), "label": rng.choice(LABELS), "id": str(i)}
            rows.append([cells[name] for name in order])
        assert swallowed(written([order, *rows], rng.choice(["\n", "\r\n"]))) == [], seed


def test_stray_quotes_at_random_are_found_where_they_swallow_many_rows() -> None:
    checked = 0
    for seed in range(300):
        rng = random.Random(seed)
        lines = bare(rng.randint(12, 90))
        for _ in range(2):
            row = rng.randrange(1, len(lines))
            place = rng.choice([0, lines[row].index(",") + 1, rng.randrange(len(lines[row]))])
            lines[row] = lines[row][:place] + '"' + lines[row][place:]
        cells = [cell for row in csv.reader(io.StringIO(file(lines))) for cell in row]
        if max(cell.count("\n") for cell in cells) > 3:
            checked += 1
            assert swallowed(file(lines)), seed
    assert checked > 50


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("name", ["banking77", "medical_abstracts", "medquad"])
def test_real_data_sets_are_no_fault(name: str) -> None:
    rows = pd.read_parquet(SHARED / f"{name}.parquet").head(3000)
    rows.iloc[::5, -1] = "Dear team,\n" + rows.iloc[::5, -1].astype(str) + "\nRegards, client"
    assert swallowed(rows.to_csv(index=False)) == []


# --- Separators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_another_sign_between_columns_is_named(sign: str) -> None:
    assert separator(f"text{sign}label\na, b{sign}x\n", ["text", "label"]) == sign
    assert separator(f'"text"{sign}"label"\n"a\nb"{sign}x\n', ["text", "label"]) == sign
    assert separator(f"text{sign}words\n", ["text", "label"]) == sign  # that a column lacks is the next thing to say
    assert separator(f"sep={sign}\ntext{sign}label\n", ["text", "label"]) == sign  # as spreadsheets begin


@pytest.mark.parametrize("head", ["text,label", "text,label;kind", "text,words", '"text,label', "text"])
def test_commas_that_part_the_columns_are_no_fault(head: str) -> None:
    assert separator(f"{head}\na;b,c;d\n", ["text", "label"]) is None
