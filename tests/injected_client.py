"""A site's client process whose noise keys are a simulation's: for tests alone. No option of the package does this."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedsynth.clients.process import main, serve


def opener(context: Any, envelope: Any) -> Any:
    """As `fedsynth.clients.site.site_home`, but for where the keys come from."""
    import os

    from fedsynth.clients.home import cell_of
    from fedsynth.clients.site import SITE, home_of, load_site
    from fedsynth.privacy.noise import simulated_key

    cell = cell_of(str(context.run_config["scenario-toml"]), envelope.arm, envelope.seed)

    def keys(counter: int, binding: str) -> bytes:
        return simulated_key(cell.seed, envelope.home, counter, binding)

    return home_of(load_site(Path(os.environ[SITE])), cell, envelope, {}, keys=keys)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), opener)
    main(sys.argv[1:], opener)
