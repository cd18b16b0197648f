"""A server without its clients: a run's exchanges are written down once, and answered from that later.

As a script, `server_alone.py SCENARIO RECORDING PLACE CLIENTS`: a run with recorded clients, then one with real ones;
prints as JSON which files each of them opened, and which modules of the client's side the first one loaded.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

OPENED: list[str] = []  # what Python opens; readers in Rust or C++ do not tell


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | Path):
        OPENED.append(str(Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]).absolute()))


if __name__ == "__main__":
    sys.addaudithook(listen)  # before anything else is imported

from flwr.app import ConfigRecord, Message, RecordDict  # noqa: E402 - after the hook
from local import LocalGrid  # noqa: E402 - after the hook

from fedsynth.app.fedsynth_sim.server_app import conduct  # noqa: E402 - after the hook


def with_clients(toml: str, out: Path, clients: int) -> LocalGrid:
    """A run with real clients in this process."""
    from fedsynth.clients.app import client_app, simulation

    grid = LocalGrid(client_app(simulation), clients, {"scenario-toml": toml, "out-dir": str(out)})
    _conduct(grid, toml, out)
    return grid


def record(grid: LocalGrid, path: Path) -> None:
    """Writes down all replies of a run, in the order of its orders."""
    replies = [{name: dict(found) for name, found in r.content.items()} for r in grid.replies_in_order()]
    path.write_bytes(pickle.dumps(replies))


def with_recording(toml: str, out: Path, clients: int, path: Path) -> LocalGrid:
    """A run in which what was written down answers."""
    replies = pickle.loads(path.read_bytes())

    def answer(message: Message, _: object) -> Message:
        found = replies[int(message.metadata.message_id.rpartition("-")[2])]
        return Message(RecordDict({name: ConfigRecord(values) for name, values in found.items()}), reply_to=message)

    app: Any = answer
    grid = LocalGrid(app, clients, {})
    _conduct(grid, toml, out)
    return grid


def _conduct(grid: LocalGrid, toml: str, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "scenario.toml").write_text(toml)  # the launcher's work
    conduct(grid, toml, out)


def main(scenario: Path, recording: Path, place: Path, clients: int) -> dict[str, list[str]]:
    """What each of the two runs opened."""
    toml = scenario.read_text()
    OPENED.clear()
    with_recording(toml, place / "alone", clients, recording)
    alone = sorted(set(OPENED))
    loaded = sorted(name for name in sys.modules if name.startswith("fedsynth.clients."))
    OPENED.clear()
    with_clients(toml, place / "together", clients)
    return {"alone": alone, "loaded": loaded, "together": sorted(set(OPENED))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
