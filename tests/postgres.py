"""A PostgreSQL server of its own, for as long as a test needs it; it listens on a Unix socket alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

REQUIRED = "FEDSYNTH_REQUIRE_POSTGRES"  # set in CI: a missing PostgreSQL fails there
OWNER, PASSWORD = "owner", "s3cr3t-0wner"


@dataclass(frozen=True)
class Server:
    """Where it listens: the folder of its socket."""

    folder: Path

    def url(self, user: str = OWNER, password: str = PASSWORD, database: str = "postgres") -> str:
        """As SQLAlchemy writes it."""
        return f"postgresql://{user}:{password}@/{database}?host={self.folder}"

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """As the owner; rows of the last statement, if it gives any."""
        with psycopg.connect(host=str(self.folder), user=OWNER, password=PASSWORD, dbname="postgres") as connection:
            for statement in statements:
                done = connection.execute(statement)
            return done.fetchall() if done.description else []


@contextmanager
def served() -> Iterator[Server]:
    """A server with a new, empty cluster; skips the test where PostgreSQL is not installed."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    # PostgreSQL refuses to run as root. Not pytest's own directory: another user may not enter that.
    user = _other_user() if os.geteuid() == 0 else None
    as_user: dict[str, Any] = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 bytes

    def call(*words: object) -> None:
        with (folder / "said").open("a") as out:  # no pipe: the server would keep it open
            environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder)}
            done = subprocess.run(
                list(map(str, words)),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=60,
                check=False,
                **as_user,
            )
        assert done.returncode == 0, "\n".join(path.read_text() for path in folder.glob("[sl]*") if path.is_file())

    try:
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        call(
            initdb,
            "-D",
            folder / "data",
            "-U",
            OWNER,
            "--pwfile",
            folder / "password",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        )
        settings = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=10 -c shared_buffers=8MB"
        call(pg_ctl, "-D", folder / "data", "-l", folder / "log", "-o", settings, "-w", "-t", "50", "start")
        yield Server(folder)
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            call(pg_ctl, "-D", folder / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def _program(name: str) -> str:
    known = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), reverse=True)]
    found = next((path for path in known if path), None)
    if found is None:
        lacks = f"{name} of PostgreSQL is neither on the PATH nor in /usr/lib/postgresql/*/bin"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{lacks}, and {REQUIRED} is set")
        pytest.skip(f"{lacks}: install PostgreSQL, on Debian the package postgresql")
    return found


def _other_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
