"""Figures and tables of a page as files of their own."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fedsynth.reporting.figures import Mark, Series, bars, dots, lines, scatter
from fedsynth.reporting.page import Number, Page, Paragraph, Plot, Plots, Section, Table
from fedsynth.reporting.page_files import COLOURS, SCALE, as_csv, as_latex, as_png, export, plain_svg
from fedsynth.typed import BadValue

TABLE = Table(
    ["arm", "95 % interval"],
    [
        ["no_dp & more", ("[", Number("-0.012", 3), ", ", Number("0.345", 4), "]")],
        ["a-2", (Number("0.5", 5), " ± 0.1")],
    ],
    caption="A {table}, of two",
)
MARKS = (Mark(0.5, 0.4, 0.6, row=1), Mark(0.7, 0.6, 0.8, row=2), Mark(0.2, 0.1, 0.3, row=3))
DRAWN = {
    "dots": dots(["one", "two", "three"], [Series("accuracy", MARKS)], title="t", zero=True),
    "bars": bars(["one", "two"], MARKS[:2], title="t"),
    "lines": lines(
        [Series(n, tuple(Mark(v, x=x) for x, v in enumerate((1, 3, 2)))) for n in "ab"], title="t", x_name="x"
    ),
    "scatter": scatter(
        [Series(n, (Mark(0.5, 0.4, 0.6, x=i),)) for i, n in enumerate("abcdefgh")], title="t", x_name="x", y_name="y"
    ),
}


def test_a_tables_cells_are_those_of_the_page() -> None:
    rows = list(csv.reader(io.StringIO(as_csv(TABLE))))
    assert rows == [["arm", "95 % interval"], ["no_dp & more", "[-0.012, 0.345]"], ["a-2", "0.5 ± 0.1"]]


def test_signs_that_latex_reads_otherwise_are_spelt_out() -> None:
    said = as_latex(TABLE, TABLE.caption)
    assert r"\caption{A \{table\}, of two}" in said
    assert r"\begin{tabular}{lr}" in said
    assert r"arm & 95 \% interval \\" in said
    assert r"no\_dp \& more & [$-$0.012, 0.345] \\" in said
    assert r"a-2 & 0.5 $\pm$ 0.1 \\" in said


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawing_needs_no_page(kind: str) -> None:
    page = str(DRAWN[kind])
    assert "var(" in page or kind == "bars"
    drawing = plain_svg(page)
    assert "var(" not in drawing
    assert "class=" not in drawing
    assert "data-row" not in drawing
    root = ElementTree.fromstring(drawing)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts == {element.text for element in ElementTree.fromstring(page).iter("text")}


def pixels(kind: str) -> np.ndarray:
    found = as_png(plain_svg(str(DRAWN[kind])))
    assert found is not None
    return np.array(Image.open(io.BytesIO(found)).convert("RGB")).astype(int)


def near(image: np.ndarray, x: float, y: float, colour: str) -> bool:
    """True if a colour stands within two units of a place of the drawing."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    across, down = int(x * SCALE), int(y * SCALE)
    around = image[max(0, down - 6) : down + 7, max(0, across - 6) : across + 7]
    return bool((abs(around - wanted).sum(axis=2) < 30).any())


def test_an_image_has_every_mark_at_its_place() -> None:
    image = pixels("dots")
    root = ElementTree.fromstring(plain_svg(str(DRAWN["dots"])))
    assert image.shape[:2] == (round(float(root.attrib["height"]) * SCALE), round(float(root.attrib["width"]) * SCALE))
    marks = [e.attrib["d"] for e in root.iter("{http://www.w3.org/2000/svg}path") if e.attrib["d"].endswith("Z")]
    assert len(marks) == 3
    for colour, path in zip(COLOURS, marks, strict=False):
        corners = [tuple(map(float, part.split("a")[0].split())) for part in path.strip("MZ").split("L")]
        x, y = (sum(place) / len(corners) for place in zip(*corners, strict=True))
        assert near(image, x + (5 if "a" in path else 0), y, colour), path
        assert not near(image, x, y + 13, colour)


def test_what_is_drawn_last_stands_in_front() -> None:
    image = pixels("scatter")  # the first mark's disc covers its interval, with a rim of paper
    circle = next(
        e for e in ElementTree.fromstring(plain_svg(str(DRAWN["scatter"]))).iter() if "a5.0" in e.get("d", "")
    )
    x, y = map(float, circle.attrib["d"][1:].split("a")[0].split())
    column = image[int((y - 6) * SCALE) : int(y * SCALE), round((x + 5) * SCALE)]
    assert (column.sum(axis=1) > 720).any()


def test_every_figure_and_table_becomes_a_file(tmp_path: Path) -> None:
    section = Section("Utility", "utility", [Paragraph("words"), TABLE, Plots([Plot(DRAWN["bars"], "Bars, of two")])])
    made = export(Page("t", "l", "b", [section], "x.parquet"), tmp_path / "new" / "folder")
    assert [path.name for path in made] == [
        "utility-1-a-table.csv",
        "utility-1-a-table.tex",
        "utility-2-bars.svg",
        "utility-2-bars.png",
    ]
    assert all(path.stat().st_size for path in made)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadValue, match="name another folder"):
        export(Page("t", "l", "b", [section], "x.parquet"), tmp_path / "file")


def test_without_matplotlib_there_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert as_png(plain_svg(str(DRAWN["bars"]))) is None
