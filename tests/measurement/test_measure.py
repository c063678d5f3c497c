"""Measuring: figures, records instead of a second measurement, a process that hangs or dies."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fake_device import Refusing
from small_graphs import Maker

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.errors import BuildError, ConfigError, MeasurementError
from lightning_baqe.measurement.database import Records
from lightning_baqe.measurement.device import Measurement
from lightning_baqe.measurement.local import Local


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    maker = Maker(16, 16)
    maker.conv(maker.conv(out=32, padding=1), out=16, padding=1, limits=None)
    return baqe.build(maker.graph(), schedules="default")


def test_figures_are_plausible(artifact: Artifact, tmp_path: Path) -> None:
    measured = baqe.measure(artifact, repeats=20, warmup=2)
    assert 1.0 < measured.latency_us < 1e5
    assert len(measured.samples_us) == 20
    assert min(measured.samples_us) > 0
    assert measured.device["threads"] == 1
    assert measured.spread >= 0
    assert not measured.cached
    by_folder = baqe.measure(artifact.save(tmp_path / "artifact"), repeats=5)
    assert by_folder.latency_us > 0


def test_the_second_time_comes_from_the_records(artifact: Artifact, tmp_path: Path) -> None:
    records, refusing = Records(tmp_path / "records.db"), Refusing(tmp_path / "none.db")
    first = baqe.measure(artifact, repeats=5, records=records)
    second = baqe.measure(artifact, refusing, repeats=5, records=records)
    assert second.cached
    assert (second.latency_us, second.samples_us) == (first.latency_us, first.samples_us)
    with pytest.raises(AssertionError, match="again"):
        baqe.measure(artifact, refusing, repeats=5)


def test_precision_or_the_limit_ends_it(artifact: Artifact) -> None:
    easy = baqe.measure(artifact, repeats=6, precision=1e6)
    assert len(easy.samples_us) == 6
    hard = baqe.measure(artifact, repeats=6, precision=1e-12, limit_s=0.2)
    assert len(hard.samples_us) > 6
    low, high = hard.interval_us
    assert low <= hard.latency_us <= high
    assert len(hard.reference_us) == -(-(len(hard.samples_us) - 6) // 10) + 1
    assert min(hard.reference_us) > 0


def test_cold_caches_are_slower(artifact: Artifact, tmp_path: Path) -> None:
    records = Records(tmp_path / "records.db")
    cold = baqe.measure(artifact, repeats=15, cold=True, records=records)
    warm = baqe.measure(artifact, repeats=15, records=records)
    assert not warm.cached
    assert min(cold.samples_us) > min(warm.samples_us)
    assert baqe.measure(artifact, cold=True, records=records).samples_us == cold.samples_us


def test_a_hanging_measurement_ends_and_the_next_one_works(artifact: Artifact) -> None:
    with pytest.raises(MeasurementError, match=r"no answer within 0\.5 s"):
        baqe.measure(artifact, repeats=10**7, timeout_s=0.5, limit_s=0.1)
    assert baqe.measure(artifact, repeats=5).latency_us > 0


def test_a_dead_process_is_an_error_and_is_replaced(artifact: Artifact) -> None:
    process = Local().process(1)._running()
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(MeasurementError, match="died"):
        baqe.measure(artifact, repeats=10**7, timeout_s=60)
    assert baqe.measure(artifact, repeats=5).latency_us > 0


def test_an_error_in_the_process_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="no artifact"):
        Local().process(1).ask({"artifact": str(tmp_path), "warmup": 0}, 30)


def test_wrong_arguments(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moon"):
        baqe.measure(artifact, device="moon")
    with pytest.raises(ConfigError, match="repeats"):
        baqe.measure(artifact, repeats=0)
    for wrong in ({"precision": 0.0}, {"limit_s": 0.0}, {"limit_s": 9.0, "timeout_s": 9.0}):
        with pytest.raises(ConfigError, match="precision must be positive and limit_s between"):
            baqe.measure(artifact, **wrong)
    with pytest.raises(BuildError):
        baqe.measure(tmp_path)
    with pytest.raises(ConfigError, match="cores"):
        Local().process(4096).ask({}, 1)


def test_spread() -> None:
    assert Measurement(10.0, (10.0,) * 8, {}).spread == 0
    assert Measurement(10.0, (5.0, 10.0, 10.0, 15.0), {}).spread > 0.5
    assert Measurement(10.0, (10.0,), {}).spread == 0


def test_drift() -> None:
    assert Measurement(10.0, (10.0,), {}).drift == 0
    assert Measurement(10.0, (10.0,), {}, reference_us=(1.0, 1.0, 2.0, 2.0)).drift == 1.0
    assert Measurement(10.0, (10.0,), {}, reference_us=(2.0, 2.0, 50.0, 1.0, 1.0)).drift == -0.5


def test_noise() -> None:
    assert not Measurement(10.0, (10.0,) * 6, {}).noisy
    assert Measurement(10.0, (10.0,) * 5, {}).noisy  # too few to tell
    assert Measurement(10.0, (9.0, 10.0, 11.0) * 3, {}).noisy
    assert not Measurement(10.0, (9.9, 10.0, 10.1) * 3, {}).noisy
