"""Replaces workers that die: Flower puts a dead Ray actor back into its pool, where each later message fails."""

from __future__ import annotations

from typing import Any

import ray
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import RayError, RayTaskError


def replace_the_dead() -> None:
    """Makes the pool of this process replace each dead worker. The worker's message still fails, and the
    server asks again (`fedsynth.federation.delivery.worker_retry`). Further calls change nothing."""
    BasicActorPool.fetch_result_and_return_actor_to_pool = _fetch  # type: ignore[method-assign, assignment]  # on purpose


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
