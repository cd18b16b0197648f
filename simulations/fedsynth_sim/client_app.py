"""The ClientApp: answers with its partition."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def echo(message: Message, context: Context) -> Message:
    """Say which partition answers."""
    echo = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
    return Message(RecordDict({"echo": echo}), reply_to=message)
