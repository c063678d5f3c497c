"""Devices own their identity and their records."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_device import FakeDevice

from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.measurement.database import Records
from lightning_baqe.measurement.device import REPEATS, KernelTurn
from lightning_baqe.measurement.local import Local, reach


def test_figures_are_kept_under_the_device(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    local, board = Local(path), FakeDevice(path)
    assert not path.exists()  # before anything is asked of it
    board.records.add_model("plan", 1, [1.0], 1.0)
    assert local.records.model("plan", 1) is None
    local.records.add_model("plan", 1, [2.0], 2.0)
    assert Records(path).model("plan", 1) == (2.0, [2.0])  # a database by itself is this machine's
    assert Records(path, board.info).model("plan", 1) == (1.0, [1.0])


def test_one_device_may_keep_several_databases(tmp_path: Path) -> None:
    device = FakeDevice(tmp_path / "one.db")
    device.records.add_model("plan", 1, [1.0], 1.0)
    other = device.keeping(tmp_path / "two.db")
    assert other.records.model("plan", 1) is None
    assert other.info() == device.info()
    assert device.records.model("plan", 1) == (1.0, [1.0])


def test_all_of_this_machine_share_its_measuring_processes(tmp_path: Path) -> None:
    assert Local(tmp_path / "one.db").process(1) is Local().process(1)


def test_ways_to_a_device() -> None:
    assert isinstance(reach("local"), Local)
    with pytest.raises(ConfigError, match="unknown device 'moon'; give 'local' or a Device"):
        reach("moon")


def test_a_turn_has_all_its_samples() -> None:
    assert KernelTurn((), exact=False).samples_us == ()  # a wrong result needs no samples
    with pytest.raises(MeasurementError, match=f"has {REPEATS} samples, the device gave 1"):
        KernelTurn((3.0,), exact=True)


_ASKS_AND_DIES = """
import os, sys, threading
from lightning_baqe.measurement.worker_process import WorkerProcess
process = WorkerProcess()
process._running()
print(process._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills children of dead parents, others are asked to end")
def test_a_worker_does_not_outlive_who_asks() -> None:
    done = subprocess.run([sys.executable, "-c", _ASKS_AND_DIES], stdout=subprocess.PIPE, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the measuring process is still there"
        time.sleep(0.1)
