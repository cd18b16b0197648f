"""The ServerApp: asks every client once and writes how the run ended."""

import json
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

CLIENTS = 8


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run and leave events.jsonl and status.json in `out-dir`."""
    out = Path(str(context.run_config["out-dir"]))
    if not out.is_absolute():
        raise ValueError(f"out-dir must be an absolute folder, got {str(out)!r}")
    while len(nodes := list(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.1)
    questions = [Message(RecordDict(), message_type="query", dst_node_id=node) for node in nodes]
    with (out / "events.jsonl").open("a") as events:
        for reply in grid.send_and_receive(questions, timeout=600):
            events.write(json.dumps({"event": "answer", "partition": reply.content["echo"]["partition-id"]}) + "\n")
    (out / "status.json").write_text(json.dumps({"status": "completed"}))
