"""Packages whose public names are imported when first used, so that what needs only torch loads only torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Lookup = tuple[Callable[[str], Any], Callable[[], list[str]]]


def on_first_use(package: str, homes: Mapping[str, Sequence[str]]) -> Lookup:
    """The ``__getattr__`` and the ``__dir__`` of a package (PEP 562).

    Args:
        package: its ``__name__``.
        homes: ``{module below the package: its public names}``.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *home})
