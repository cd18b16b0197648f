"""fedsynth: federated transfer of knowledge between a server LLM and clients' small language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsynth.simulation.simulate import Result as Result
    from fedsynth.simulation.simulate import run as run

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "run"]


def __getattr__(name: str) -> Any:
    # `run` brings torch and Flower, seconds of imports that a reader of ledgers and reports need not wait for.
    if name in ("run", "Result"):
        from fedsynth.simulation import simulate

        return getattr(simulate, name)
    raise AttributeError(f"module 'fedsynth' has no attribute {name!r}")
