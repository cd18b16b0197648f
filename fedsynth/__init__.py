"""fedsynth: federated transfer of knowledge between a server LLM and clients' small language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsynth.api import check as check
    from fedsynth.api import compare as compare
    from fedsynth.api import load as load
    from fedsynth.api import report as report
    from fedsynth.api import resume as resume
    from fedsynth.api import run as run
    from fedsynth.corpus import Corpus as Corpus
    from fedsynth.scenario.schema import Scenario as Scenario
    from fedsynth.simulation.result import Result as Result

__version__ = "0.1.0"
_PLACES = {
    **dict.fromkeys(("check", "compare", "load", "report", "resume", "run"), "fedsynth.api"),
    "Corpus": "fedsynth.corpus",
    "Result": "fedsynth.simulation.result",
    "Scenario": "fedsynth.scenario.schema",
}
__all__ = ["Corpus", "Result", "Scenario", "__version__", "check", "compare", "load", "report", "resume", "run"]


def __getattr__(name: str) -> Any:
    # On first use: a reader of ledgers need not wait for what others bring (a run: torch and Flower, seconds).
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'fedsynth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
