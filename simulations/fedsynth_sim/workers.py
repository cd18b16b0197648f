"""Replaces workers that die: Flower puts a dead Ray actor back into its pool, where each later message fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import RayError, RayTaskError

ANSWER_SECONDS = 0.2  # a worker that is up answers in a millisecond; one that does not is looked at again later
LOOK_SECONDS = 0.05  # between two looks, while no worker is there for a message

_choosing = threading.Lock()
_silent: dict[Any, Any] = {}  # by worker that has not yet answered: the call that it will answer when it is up


def replace_the_dead() -> None:
    """Makes the pool of this process replace each dead worker. The worker's message still fails, and the
    server asks again (`fedsynth.federation.delivery.worker_retry`). Further calls change nothing."""
    BasicActorPool.fetch_result_and_return_actor_to_pool = _fetch  # type: ignore[method-assign, assignment]  # on purpose
    BasicActorPool.submit = _submit  # type: ignore[method-assign, assignment]  # on purpose


def _fetch(pool: Any, future: Any) -> tuple[Any, Any]:
    """Flower's own function, except for a worker that died (or was killed for memory, which raises another class): the
    caller puts the replacement back into the pool."""
    try:
        _, reply, context = ray.get(future)
    except RayTaskError:
        raise  # the client's own: the worker lives
    except RayError:
        pool._future_to_actor[future] = pool.create_actor_fn()
        raise
    pool.add_actor_back_to_pool(future)
    return reply, context


def _submit(pool: Any, run_on: Any, job: Any) -> Any:
    """Flower's own function, except that a message waits for a worker that is up. When a cluster's machine is lost, its
    idle workers die unseen, and their replacements start only where others leave room, perhaps never."""
    while (worker := _one_that_is_up(pool)) is None:
        time.sleep(LOOK_SECONDS)
    future = run_on(worker, *job)
    pool._future_to_actor[future] = worker
    return future


def _one_that_is_up(pool: Any) -> Any:
    """Takes a worker out of the pool; None if none of it is up."""
    with _choosing:
        patience = ANSWER_SECONDS
        for worker in tuple(pool.pool):
            if worker in _silent:
                if not _answered(_silent[worker], 0.0):
                    continue
                del _silent[worker]  # that answer may be old: it is asked again
            call = worker.__ray_ready__.remote()
            if not _answered(call, patience):
                _silent[worker], patience = call, 0.0  # one wait a look, however many are silent
                continue
            pool.pool.remove(worker)
            try:
                ray.get(call)
            except RayError:
                pool.pool.append(pool.create_actor_fn())
                continue
            return worker
    return None


def _answered(call: Any, seconds: float) -> bool:
    return bool(ray.wait([call], timeout=seconds)[0])
