"""The map of the house: every package and module with the first line of its docstring.

`python tests/house.py` writes it into docs/design.md; a test compares the two.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "design.md"
WINGS = (
    "fedsynth",
    "strategies",
    "clients",
    "simulations/fedsynth_sim",
    "simulations/assets",
    "simulations/benchmarks",
    "simulations/models",
)
MARKS = ("<!-- the map: python tests/house.py -->\n", "<!-- end of the map -->\n")


def first_line(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line without the last full stop."""
    words = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return " ".join(words.split()).removesuffix(".")


def rooms(folder: Path) -> list[str]:
    """The lines of one folder: its own, its modules, then those of the folders in it."""
    own = folder / "__init__.py"
    name = folder.relative_to(ROOT).as_posix()
    lines = [f"\n**`{name}/`**" + (f": {first_line(own)}.\n" if own.exists() else "\n")]
    lines += [f"- `{path.name}`: {first_line(path)}" for path in sorted(folder.glob("*.py")) if path != own]
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and any(inner.glob("*.py")):
            lines += rooms(inner)
    return lines


def house() -> str:
    """The whole map as Markdown."""
    return "\n".join(line for wing in WINGS for line in rooms(ROOT / wing)).lstrip("\n") + "\n"


def written() -> str:
    """docs/design.md with the map as it should be."""
    begin, end = MARKS
    before, _, rest = PAGE.read_text().partition(begin)
    return f"{before}{begin}\n{house()}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written())
