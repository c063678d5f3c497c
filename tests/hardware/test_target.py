"""Which code this process may execute."""

from __future__ import annotations

import pytest

from lightning_baqe.errors import BuildError
from lightning_baqe.hardware import target
from lightning_baqe.hardware.target import NEEDED_FLAGS, can_run, get_target, obstacle


def test_tiles_need_the_systems_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "cpu_flags", lambda: frozenset(NEEDED_FLAGS["amx"]))
    monkeypatch.setattr(target, "ask_for_tiles", lambda: "which the system forbids")
    assert obstacle("amx") == "which the system forbids"
    assert not can_run("amx")
    monkeypatch.setattr(target, "ask_for_tiles", lambda: None)
    assert obstacle("amx") is None
    assert obstacle("amx", vbmi=True) == "which this CPU does not have"


def test_asking_for_tiles_is_harmless() -> None:
    """Also where there are none: the kernel says no."""
    assert (target.ask_for_tiles() is None) == can_run("amx")
    assert can_run("portable")


def test_what_stands_for_tiles_is_never_native() -> None:
    assert get_target().path in target.NATIVE
    assert not {"amx_vnni", "amx_plain"} & set(target.NATIVE)
    with pytest.raises(BuildError, match="unknown target 'tpu'; choose one of native, amx, vnni512"):
        get_target("tpu")
