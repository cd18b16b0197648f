"""Folders that only their owner can read."""

from __future__ import annotations

import contextlib
from pathlib import Path

OTHERS = 0o077


def private_folder(path: Path) -> None:
    """Makes a folder and its missing parents for their owner alone (mode 0700).

    `mkdir` alone would give new parents the umask's mode. Folders that exist stay as they are.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was first, and makes it private
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)  # an umask can take the owner's rights, too


def close(path: Path) -> list[Path]:
    """Takes the rights of others from a folder and all folders below; returns the changed ones. It follows no links.

    Raises:
        OSError: If a folder belongs to another user.
    """
    found = [path, *(folder for folder in sorted(path.rglob("*")) if folder.is_dir() and not folder.is_symlink())]
    opened = [folder for folder in found if folder.stat().st_mode & OTHERS]
    for folder in opened:
        folder.chmod(folder.stat().st_mode & 0o700)
    return opened
