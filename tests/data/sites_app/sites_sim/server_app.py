"""Says what it was given; the first time it then computes without a word to anybody, the second time it fails."""

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    out = Path(str(context.run_config["out-dir"]))
    (out.with_name(out.name + ".private") / "server.pid").write_text(str(os.getpid()))
    first = not (out / "events.jsonl").exists()
    names = [node.name for node in grid.get_nodes()]
    print("a line of the ServerApp's")
    with (out / "events.jsonl").open("a") as file:
        told = json.loads(str(context.run_config["deployment"]))
        file.write(json.dumps({"event": "started", "pid": os.getpid(), "deployment": told, "names": names}) + "\n")
    while first:
        pass
    (out / "status.json").write_text(json.dumps({"status": "failed", "reason": "the reason\nin words"}))
