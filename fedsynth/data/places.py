"""The place of a data source; it reads nothing, so that a missing file is noticed before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from fedsynth.typed import BadValue

SAVED = ("dataset_dict.json", "dataset_info.json")  # files that datasets.save_to_disk leaves in a folder


def find(source: str) -> Path:
    """The file or saved data set that a scenario names: at that path, or in the folder named by FEDSYNTH_DATA.

    Raises:
        BadValue: If it is in neither place.
    """
    places = [Path(source)]
    if folder := os.environ.get("FEDSYNTH_DATA"):
        places.append(Path(folder) / source)
    for place in places:
        if place.is_file() or _is_saved(place):
            return place
    if any(place.is_dir() for place in places):
        raise BadValue(f"{source}: is a folder, but none that datasets.save_to_disk wrote: name a file in it")
    raise BadValue(f"no data file {source!r} (looked in {', '.join(str(p.parent.absolute()) for p in places)})")


def _is_saved(place: Path) -> bool:
    return any((place / name).is_file() for name in SAVED)
