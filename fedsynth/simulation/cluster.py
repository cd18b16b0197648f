"""A Ray cluster that runs already: what it has room for, and what a run on it needs in its environment.

As a script, `cluster.py` joins the cluster and prints the resources of each machine as JSON.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsynth.simulation.flower import KEEPING, MARKER, environment, one_line
from fedsynth.typed import BadValue

REACH_SECONDS = 5.0  # for a connection to a port of the cluster's first machine
JOIN_SECONDS = 120.0  # for Ray's own start there: some 3 s on an idle machine
# The cluster's own secret. All other RAY_* variables of the environment may belong to another cluster.
SECRETS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster's room.

    Attributes:
        address: HOST:PORT of its first machine.
        machines: The number of its machines that are up.
        workers: How many client processes it runs at once: one per CPU of `ray start --num-cpus`, on machines with a
            GPU if any has one.
        gpu_share: The share of one GPU that each worker counts as its own; 0 without GPUs.
    """

    address: str
    machines: int
    workers: int
    gpu_share: float

    def __str__(self) -> str:
        workers, machines = (
            f"{n} {name}{'' if n == 1 else 's'}" for n, name in ((self.workers, "worker"), (self.machines, "machine"))
        )
        return f"{workers} on {machines} of the Ray cluster at {self.address}"


def cluster_at(address: str) -> Cluster:
    """Looks at a Ray cluster that this machine belongs to.

    Args:
        address: HOST:PORT, as for `ray start --address`.

    Raises:
        BadValue: If there is none, if this machine is none of its, or if it has no CPU for a client.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise BadValue(f"--ray needs the HOST:PORT of a Ray cluster's first machine, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as problem:
        raise BadValue(
            f"no Ray cluster answers at {address} ({problem}): start one there with `ray start --head --port={port}`"
        ) from None
    way_out = f"this machine must belong to it (ray start --address={address}), with its version of Ray and its secret"
    try:
        done = subprocess.run(
            # -P and a path rather than -m: modules of this package must not be found under top-level names.
            [sys.executable, "-P", __file__],
            env=environment("", host) | cluster_environment(address, os.environ),
            capture_output=True,
            text=True,
            timeout=JOIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadValue(f"the Ray cluster at {address} gave no answer in {JOIN_SECONDS:.0f} s: {way_out}") from None
    if done.returncode:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise BadValue(f"the Ray cluster at {address} cannot be used from here ({one_line(said)}): {way_out}")
    return room(address, json.loads(done.stdout.splitlines()[-1]))


def room(address: str, machines: Sequence[Mapping[str, float]]) -> Cluster:
    """A cluster's room by the resources of each machine ("CPU", "GPU"; absent means none).

    Raises:
        BadValue: If no client has room.
    """
    with_gpu = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    cpus = [int(machine.get("CPU", 0)) for machine in with_gpu or machines]
    if not sum(cpus):
        kind = "machine with a GPU" if with_gpu else "machine"
        raise BadValue(f"no {kind} of the Ray cluster at {address} has a CPU for clients: ray start --num-cpus=N")
    crowd = max((math.ceil(n / int(m["GPU"])) for n, m in zip(cpus, with_gpu, strict=False)), default=0)
    return Cluster(address, len(machines), sum(cpus), math.floor(1e4 / crowd) / 1e4 if crowd else 0.0)


def cluster_environment(address: str, caller: Mapping[str, str], marker: str = "") -> dict[str, str]:
    """Variables for the programs of a run on a cluster, beside `environment`.

    Workers get the environment of their machine's `ray start`. The job's description adds what the run sets itself, and
    the folders that FEDSYNTH_* names. Ray keeps that description in its logs: it holds no key of an endpoint.

    Args:
        address: HOST:PORT of the cluster's first machine.
        caller: The environment of `fedsynth run`.
        marker: Marks the processes of one run.
    """
    folders = {k: v for k, v in caller.items() if k.startswith("FEDSYNTH_")}
    workers = {**KEEPING, "OMP_NUM_THREADS": "1", **folders, MARKER: marker}
    return {
        "RAY_ADDRESS": address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": workers}}),
        **{name: caller[name] for name in SECRETS if name in caller},
    }


def _look() -> None:
    import ray

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    machines = ray.nodes()  # type: ignore[no-untyped-call]  # Ray gives it no types
    print(json.dumps([machine["Resources"] for machine in machines if machine["Alive"]]))


if __name__ == "__main__":
    _look()
