"""Where what is kept from one run to the next lies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$LIGHTNING_BAQE_CACHE``, by default ``~/.cache/lightning_baqe``."""
    base = os.environ.get("LIGHTNING_BAQE_CACHE")
    if base is not None:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_baqe"
