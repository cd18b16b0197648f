"""The figures of a page as SVG and PNG files, and its tables as CSV and LaTeX, for a paper or a slide."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fedsynth.reporting.page import Page, Plots, Table, pieces
from fedsynth.typed import BadValue

SCALE = 3  # dots per unit of a drawing: 1260 wide
FONT = "DejaVu Sans, Arial, Helvetica, sans-serif"
# As the page has them in light: a file of its own has no variables.
INK, QUIET, RULE, PAPER = "#1c2430", "#56606d", "#d6dbe2", "#ffffff"
COLOURS = ("#0b62a4", "#b54708", "#17755a", "#94337f", "#7a5c00", "#4a4fb5", "#a3283c", "#4d5866")
STYLE: Mapping[str, Mapping[str, str]] = {
    "grid": {"stroke": RULE, "stroke-width": "1"},
    "zero": {"stroke": QUIET, "stroke-width": "1.5", "stroke-dasharray": "4 3"},
    "bar": {"fill": COLOURS[0]},
    "mark": {"stroke": PAPER, "stroke-width": "1"},
    "open": {"fill": "none", "stroke-width": "2.2"},
    "line": {"fill": "none", "stroke-width": "1.8"},
    "whisker": {"fill": "none", "stroke-width": "1.6"},
    "tick": {"fill": QUIET, "font-size": "12"},
    "name": {"fill": INK, "font-size": "13"},
    "figure": {"fill": INK, "font-size": "13"},
}
NUMBERS = ("data-row", "data-value", "data-x-row", "data-x")  # of the page's table, which lies elsewhere


def export(page: Page, folder: Path) -> list[Path]:
    """Writes every figure and table of a page; returns the files, in the order of the page.

    A figure is `SECTION-N-CAPTION.svg` and, where matplotlib is installed, `.png`; a table `.csv` and `.tex`, which
    needs the LaTeX package booktabs. Files of these names are replaced.

    Args:
        page: A page of a report.
        folder: It is made if need be.

    Raises:
        BadValue: If the folder cannot be written.
    """
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _files(page):
            made.append(folder / name)
            made[-1].write_bytes(content)
    except OSError as problem:
        raise BadValue(f"{folder} cannot be written ({problem.strerror}): name another folder") from problem
    return made


def export_report(report: Mapping[str, Any], folder: Path) -> int:
    """Writes every figure and table of a report, of a run or of a comparison; returns the number of files.

    Args:
        report: The tree from `run_report.write` or `comparison_page.write`.
        folder: As for `export`.

    Raises:
        BadValue: As `export`.
    """
    from fedsynth.reporting import comparison_page, run_page

    return len(export((run_page if "run" in report else comparison_page).page(report), folder))


def _files(page: Page) -> Iterator[tuple[str, bytes]]:
    for section in page.sections:
        number = 0
        for block in section.blocks:
            if isinstance(block, Table):
                number += 1
                name = f"{section.anchor}-{number}{_slug(block.caption)}"
                yield f"{name}.csv", as_csv(block).encode()
                yield f"{name}.tex", as_latex(block, block.caption or section.title).encode()
            for plot in block.plots if isinstance(block, Plots) else ():
                number += 1
                name = f"{section.anchor}-{number}{_slug(plot.caption)}"
                drawing = plain_svg(str(plot.svg))
                yield f"{name}.svg", drawing.encode()
                if (image := as_png(drawing)) is not None:
                    yield f"{name}.png", image


def _slug(caption: str) -> str:
    words = re.findall(r"[a-z0-9]+", caption.split(",")[0].lower())
    return "".join(f"-{word}" for word in words[:6])


def _rows(table: Table) -> list[list[str]]:
    return [["".join(p if isinstance(p, str) else p.shown for p in pieces(cell)) for cell in row] for row in table.rows]


def as_csv(table: Table) -> str:
    """The table with its heads, cells as the page shows them."""
    found = io.StringIO()
    csv.writer(found, lineterminator="\n").writerows([list(table.heads), *_rows(table)])
    return found.getvalue()


def as_latex(table: Table, caption: str) -> str:
    """The table as a LaTeX table environment."""
    columns = "".join("l" if place in table.words else "r" for place in range(len(table.heads)))
    body = [" & ".join(map(_latex, row)) + r" \\" for row in _rows(table)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_latex, table.heads)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "ε": r"$\varepsilon$",
    "“": "``",
    "”": "''",
}


def _latex(text: str) -> str:
    text = re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)  # of a number, not of a range or a word
    return "".join(LATEX.get(sign, sign) for sign in text).replace("\u2212", "$-$")


def plain_svg(drawing: str) -> str:
    """A drawing of `reporting.figures` as a file of its own: colours and fonts in place of the page's variables."""
    root = ElementTree.fromstring(drawing)
    _, _, width, height = root.attrib["viewBox"].split()
    for element in root.iter():
        for name in NUMBERS:
            element.attrib.pop(name, None)
        shown = STYLE.get(element.attrib.pop("class", ""), {})
        colour = re.search(r"var\(--s(\d)\)", element.attrib.pop("style", ""))
        own = dict(shown)
        if colour and "stroke-width" in shown:
            own["fill" if shown.get("fill") != "none" else "stroke"] = COLOURS[int(colour[1]) - 1]
        if found := re.fullmatch(r"var\(--s(\d)\)", element.attrib.get("stroke", "")):
            own["stroke"] = COLOURS[int(found[1]) - 1]
        element.attrib.update(
            {name: value for name, value in own.items() if name == "stroke" or name not in element.attrib}
        )
    root.attrib.update(xmlns="http://www.w3.org/2000/svg", width=width, height=height)
    root.attrib["font-family"] = FONT
    root.insert(0, ElementTree.Element("rect", {"width": "100%", "height": "100%", "fill": PAPER}))
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def as_png(drawing: str) -> bytes | None:
    """The result of `plain_svg` as an image; None if matplotlib is not installed.

    It draws what `reporting.figures` writes, and no other SVG: lines, rectangles, polylines, texts, and paths of M, L,
    H, V, a whole circle by two arcs, and Z.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    root = ElementTree.fromstring(drawing)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    figure = Figure(figsize=(width / 72, height / 72), dpi=72 * SCALE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for layer, element in enumerate(list(root)[1:]):  # the last stands in front, be it a line or a shape
        _draw(axes, element, layer)
    found = io.BytesIO()
    figure.savefig(found, format="png")
    return found.getvalue()


def _draw(axes: Any, element: ElementTree.Element, layer: int) -> None:
    from matplotlib.patches import Circle, PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    at, kind = element.attrib, element.tag.rpartition("}")[2]
    stroke, wide = at.get("stroke", "none"), float(at.get("stroke-width", 1))
    dash = [float(part) for part in at.get("stroke-dasharray", "none").split() if part != "none"]
    style: Any = (0, [part / wide for part in dash]) if dash else "-"  # matplotlib counts in widths
    look = {
        "facecolor": at.get("fill", "black"),
        "edgecolor": stroke,
        "linewidth": wide,
        "linestyle": style,
        "zorder": layer,
    }
    if kind == "text":
        side = {"middle": "center", "end": "right"}.get(at.get("text-anchor", ""), "left")
        words, size = element.text or "", float(at.get("font-size", 13))
        axes.text(
            float(at["x"]), float(at["y"]), words, ha=side, va="baseline", size=size, color=at["fill"], zorder=layer
        )
    elif kind == "rect":
        x, y, w, h = (float(at[name]) for name in ("x", "y", "width", "height"))
        axes.add_patch(Rectangle((x, y), w, h, **look))
    elif kind == "line":
        places = [[float(at["x1"]), float(at["x2"])], [float(at["y1"]), float(at["y2"])]]
        axes.plot(*places, color=stroke, linewidth=wide, linestyle=style, solid_capstyle="butt", zorder=layer)
    elif kind == "polyline":
        points = [tuple(map(float, point.split(","))) for point in at["points"].split()]
        axes.plot(*zip(*points, strict=True), color=stroke, linewidth=wide, linestyle=style, zorder=layer)
    elif kind == "path" and (circle := re.match(r"M(\S+) (\S+)a(\S+) ", at["d"])):
        left, middle, radius = map(float, circle.groups())
        axes.add_patch(Circle((left + radius, middle), radius, **look))
    elif kind == "path":
        axes.add_patch(PathPatch(Outline(*_outline(at["d"], Outline)), **look))


def _outline(path: str, outline: Any) -> tuple[list[tuple[float, float]], list[Any]]:
    """The corners of a path of M, L, H, V and Z, and how each is reached."""
    corners: list[tuple[float, float]] = []
    codes: list[Any] = []
    begin = (0.0, 0.0)
    for command, rest in re.findall(r"([MLHVZ])([^MLHVZ]*)", path):
        numbers = _floats(rest)
        x, y = corners[-1] if corners else begin
        if command == "Z":
            corner, code = begin, outline.CLOSEPOLY
        elif command in "ML":
            corner, code = (numbers[0], numbers[1]), outline.MOVETO if command == "M" else outline.LINETO
            begin = corner if command == "M" else begin
        else:
            corner, code = ((numbers[0], y) if command == "H" else (x, numbers[0])), outline.LINETO
        corners.append(corner)
        codes.append(code)
    return corners, codes


def _floats(text: str) -> Sequence[float]:
    return [float(part) for part in text.split()]
