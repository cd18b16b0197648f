"""A site's client process whose noise keys are a simulation's, and which keeps what Flower's serialiser is given.

For tests alone: no option of the package does either.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import Any

from fedsynth.deployment.client_process import main, serve

DUMP = "FEDSYNTH_TEST_DUMP"  # a folder for the objects that are sent


def opener(context: Any, envelope: Any) -> Any:
    """As `fedsynth.deployment.client.site_home`, but for where the keys come from."""
    from fedsynth.clients.client_side import cell_of
    from fedsynth.deployment.client import client_side
    from fedsynth.deployment.policy import SITE, load_site
    from fedsynth.privacy.noise import simulated_key

    _keep_what_is_sent()
    cell = cell_of(str(context.run_config["scenario-toml"]), envelope.arm, envelope.seed)

    def keys(counter: int, binding: str) -> bytes:
        return simulated_key(cell.seed, envelope.client, counter, binding)

    return client_side(load_site(Path(os.environ[SITE])), cell, envelope, {}, keys=keys)


def _keep_what_is_sent() -> None:
    """Every object of a reply as Flower serialises it."""
    import flwr.supernode.runtime.run_clientapp as runtime

    folder = os.environ.get(DUMP)
    if folder is None or getattr(runtime, "_kept", False):
        return
    send = runtime.push_objects

    def keep(objects: Any, *arguments: Any, **more: Any) -> Any:
        for each in objects.values():
            (Path(folder) / f"{type(each).__name__}-{uuid.uuid4().hex}").write_bytes(each.deflate())
        return send(objects, *arguments, **more)

    runtime.push_objects = keep
    runtime._kept = True


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), opener)
    main(sys.argv[1:], opener)
