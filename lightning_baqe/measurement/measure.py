"""Measure latency on a device: warmed up, with a timeout, many samples."""

from __future__ import annotations

from pathlib import Path

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.measurement.database import Records
from lightning_baqe.measurement.device import Device, Measurement, Sampling
from lightning_baqe.measurement.local import reach
from lightning_baqe.scratch import temporary_folder


def measure(
    artifact: Artifact | Path | str,
    device: Device | str = "local",
    repeats: int = 50,
    warmup: int = 10,
    timeout_s: float = 60.0,
    records: Records | None = None,
    precision: float | None = None,
    limit_s: float = 10.0,
    cold: bool = False,
) -> Measurement:
    """Latency of an artifact, batch 1.

    Args:
        artifact: an artifact, or its folder.
        device: ``local``, or any :class:`~lightning_baqe.measurement.device.Device`.
        repeats: samples; with ``precision``: at least so many.
        warmup: runs before the first sample.
        timeout_s: for the whole measurement.
        records: if given, code that was measured before is not measured again, and new figures are kept.
        precision: such as 0.02: go on until half the 95 % interval of the median is at most this fraction of it. The
            interval is looked at again and again, so that it holds a little less often than 95 %.
        limit_s: stop all the same after so many seconds; the measurement then says that it is ``noisy``.
        cold: fill the caches with something else before every image, as if the device did other work in between.

    Raises:
        ConfigError: an unknown device, or too many threads.
        MeasurementError: it crashed or took too long.
    """
    device = reach(device) if isinstance(device, str) else device
    sampling = Sampling(repeats, warmup, timeout_s, precision, limit_s, cold)
    loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    key = f"{loaded.plan.digest}{' cold' if cold else ''}"
    known = records.model(key, loaded.threads) if records is not None else None
    if known is not None:
        return Measurement(known[0], tuple(known[1]), device.info(loaded.threads), cached=True)
    with temporary_folder() as place:
        folder = loaded.save(Path(place) / "artifact") if isinstance(artifact, Artifact) else Path(artifact)
        found = device.measure_artifact(loaded, folder, sampling)
    if records is not None:
        records.add_model(key, loaded.threads, list(found.samples_us), found.latency_us)
    return found
