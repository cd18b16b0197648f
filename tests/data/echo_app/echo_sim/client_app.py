"""A client that says which worker serves it."""

import os
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def echo(message: Message, context: Context) -> Message:
    time.sleep(message.content.config_records["ask"]["sleep"])
    answer = ConfigRecord(
        {"partition": int(context.node_config["partition-id"]), "pid": os.getpid(), "cwd": os.getcwd()}
    )
    return Message(RecordDict({"answer": answer}), reply_to=message)
