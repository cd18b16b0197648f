"""A server that asks every client once and writes events and a status, as fedsynth's own does."""

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def ask(grid: Grid, clients: int, sleep: float) -> list[dict[str, object]]:
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(0.05)
    content = RecordDict({"ask": ConfigRecord({"sleep": sleep})})
    replies = list(
        grid.send_and_receive([Message(content, message_type="query", dst_node_id=node) for node in nodes], timeout=60)
    )
    if failed := [reply.error for reply in replies if reply.has_error()]:
        raise RuntimeError(f"{len(failed)} of {clients} clients failed:\n{failed[0].reason}")
    return [dict(reply.content["answer"]) for reply in replies]


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    out = Path(str(config["out-dir"]))

    def event(**fields: object) -> None:
        with (out / "events.jsonl").open("a") as file:
            file.write(json.dumps(fields) + "\n")

    event(event="started", pid=os.getpid(), cwd=os.getcwd(), text=config["text"])
    if config["behave"] == "fail":
        (out / "status.json").write_text(json.dumps({"status": "failed", "reason": "the reason\nin words"}))
        time.sleep(60.0)
    for answer in ask(grid, int(config["clients"]), 0.0):
        event(event="answer", **answer)
    if sleep := float(config["sleep"]):
        event(event="asked")
        ask(grid, int(config["clients"]), sleep)
    (out / "status.json").write_text(json.dumps({"status": "completed"}))
