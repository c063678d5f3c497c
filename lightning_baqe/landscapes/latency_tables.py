"""Latencies of a landscape: kernels with all knobs of a grid, kernels without knobs, and whole networks as a check.

Everything measured is on the disk before the next is measured: kernels in a records database of the landscape's own,
the rest in rows, in a folder for each device and version of the templates. What is one program at several bit-widths,
or in several layers, is measured once.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.costs.structure import SizeTable, Structure
from lightning_baqe.deploy.calls import Call
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.deploy.objects import link
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import MeasurementError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import digest
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.kernels.islands import IslandSpec
from lightning_baqe.kernels.tunable import TunableSpec, template_of
from lightning_baqe.kernels.x86.layout import SLACK
from lightning_baqe.measurement.database import KernelRecord, canonical, code_key
from lightning_baqe.measurement.device import Device, Kernel
from lightning_baqe.measurement.measure import measure
from lightning_baqe.measurement.memory import give_back_memory
from lightning_baqe.measurement.profile import KernelProfile
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.sensitivity import layer_scores
from lightning_baqe.scratch import temporary_folder
from lightning_baqe.tuning.bench import KernelBench, kernel_space, save_arguments
from lightning_baqe.tuning.network_space import NetworkSpace
from lightning_baqe.tuning.strategies import Ranked
from lightning_baqe.tuning.tuner import tune

WIDTHS = (4, 5, 6, 7, 8, 32)
TILES = 4  # of each kernel's tiles, the best by estimated cost; all other knobs keep all of their values
TUNED = 4  # knobs of each kernel that a search has tried before its first trial
SAMPLED = 2000  # bit-configs that are looked through for conversions
AGAIN = 8  # whole networks that are measured twice, for the spread
WHOLE_REPEATS, WHOLE_LIMIT_S = 60, 2.0
REWEIGHTED = 20  # rounds of the robust fit
CACHED_MB = (4.0, 8.0, 12.0, 16.0, 24.0)  # what of a network's constants may stay in caches from image to image

TERMS = ("constant", "kernels", "conversions", "calls", "megabytes", "beyond")  # of a latency


def searched_layers(base: BitConfig) -> tuple[str, ...]:
    """The layers whose bits a search chooses: all but the first and the last."""
    return tuple(base)[1:-1]


def with_bits(base: BitConfig, bits: Mapping[str, int]) -> BitConfig:
    """``base`` with these bits for weights and activations."""
    return base.replace({layer: LayerBits(width, width) for layer, width in bits.items()})


@dataclass(frozen=True)
class Subject:
    """The network of a landscape.

    Args:
        net: float, trained.
        images: a batch to calibrate on, ``(n, channels, height, width)``.
        target: compiled for, one thread.
        tiles: see :data:`TILES`.
    """

    net: nn.Module
    images: torch.Tensor
    target: CpuTarget
    tiles: int = TILES

    @property
    def base(self) -> BitConfig:
        """8 bit everywhere."""
        return BitConfig.uniform(self.net, 8, 8)

    def uniform(self, width: int) -> BitConfig:
        """All searched layers at one width."""
        return with_bits(self.base, dict.fromkeys(searched_layers(self.base), width))

    def quantized(self, bits: BitConfig) -> QuantizedModel:
        """Calibrated, not tuned: latency does not depend on weights."""
        return calibrate(quantize(self.net, bits, self.images[:1]), [self.images]).eval()

    def graph(self, bits: BitConfig) -> IntegerGraph:
        """Lowered."""
        return lower(self.quantized(bits))


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Args:
        space: of the landscape, with the best of the first :data:`TUNED` knobs as defaults once they are measured.
        specs: ``{layer: {bits: its kernel}}`` in networks of uniform bits.
        sizes: of all bits.
    """

    space: NetworkSpace
    specs: Mapping[str, Mapping[int, TunableSpec]]
    sizes: SizeTable

    def points(self, layer: str) -> list[dict[str, Any]]:
        """All knobs of a layer, in the order of its table."""
        knobs = self.space.knobs.get(layer, {})
        return [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]

    def kernels(self) -> dict[tuple[TunableSpec, str], dict[str, Any]]:
        """``{(kernel, its knobs as text): knobs}`` of everything that is measured."""
        found = {}
        for layer, specs in self.specs.items():
            for spec in specs.values():
                for point in self.points(layer):
                    knobs = template_of(spec).check_knobs(spec, point)
                    found[spec, canonical(knobs)] = knobs
        return found


def rows_folder(folder: Path, device: Device) -> Path:
    """Where figures lie that are no kernel records: another one for each device and each change of what makes code."""
    return folder / f"latency-{fingerprint(device.info())[:8]}"


def point_key(params: Mapping[str, Any]) -> str:
    """Identifies a point."""
    return digest(dict(params))[:12]


def make_grid(subject: Subject) -> Grid:
    """The grid of a network: for each knob of a layer all values that its kernels have at any bits."""
    models = {width: subject.quantized(subject.uniform(width)) for width in WIDTHS}
    graphs = {width: lower(model) for width, model in models.items()}
    base = subject.base
    choices = dict.fromkeys(searched_layers(base), WIDTHS)
    specs: dict[str, dict[int, TunableSpec]] = {layer: {} for layer in base}
    offered: dict[str, dict[str, list[Any]]] = {layer: {} for layer in base}
    for width, graph in graphs.items():
        for layer, spec in make_plan(graph, BuildOptions(subject.target)).tunable().items():
            if layer not in choices and width != 8:
                continue
            specs[layer][graph.bits[layer][1]] = spec
            template = template_of(spec)
            for knob, values in template.knob_space(spec).items():
                if knob in template.unsearched:
                    continue
                found = offered[layer].setdefault(knob, [])
                found.extend(v for v in (values[: subject.tiles] if knob == "tile" else values) if v not in found)
    several = {
        layer: {knob: tuple(values) for knob, values in found.items() if len(values) > 1}
        for layer, found in offered.items()
    }
    knobs = {layer: found for layer, found in several.items() if found}
    defaults = {
        layer: {width: template_of(spec).check_knobs(spec, {}) for width, spec in found.items()}
        for layer, found in specs.items()
    }
    sizes = SizeTable.of(graphs, {name: origin.label for name, origin in models[8].record.origins.items()})
    return Grid(NetworkSpace(base, choices, knobs, defaults), specs, sizes)


def sensitivities(subject: Subject) -> dict[str, dict[str, float]]:
    """``{layer: {bits: score}}`` of the searched layers: of a network that was not tuned, on one batch."""
    by_width = {
        str(width): layer_scores(subject.quantized(subject.uniform(width)), subject.images)
        for width in WIDTHS
        if width != FLOAT_BITS
    }
    return {
        layer: {width: scores[layer] for width, scores in by_width.items() if layer in scores}
        for layer in searched_layers(subject.base)
    }


class KernelTable:
    """Measured kernels, each program once. The folder's ``kernels.jsonl`` holds what a measurement costs; the device
    measures, and keeps the records.
    """

    def __init__(self, target: CpuTarget, folder: Path, device: Device) -> None:
        self.target, self.device = target, device
        self.rows = Rows(folder / "kernels.jsonl")
        self._by_code: dict[str, KernelRecord] = {}

    def measure(self, kernels: Mapping[tuple[TunableSpec, str], dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """Measure what is missing.

        Yields:
            how many are known of how many; first before anything is measured.
        """
        programs: dict[str, tuple[TunableSpec, dict[str, Any]]] = {}
        for (spec, text), knobs in kernels.items():
            code = self._code(spec, text)
            programs.setdefault(code, (spec, knobs))
            known = self.device.records.kernel(spec, self.target, knobs) if code not in self._by_code else None
            if known is not None:
                self._by_code[code] = known
        missing = [code for code in programs if code not in self._by_code]
        yield len(programs) - len(missing), len(programs)
        benches: dict[TunableSpec, KernelBench] = {}
        with temporary_folder() as place:
            for index, code in enumerate(missing, 1):
                spec, knobs = programs[code]
                if spec not in benches:
                    benches[spec] = KernelBench(spec, self.target, self.device, Path(place) / str(len(benches)))
                started = time.perf_counter()
                self._by_code[code] = benches[spec].measure(knobs)
                self.rows.append({"code": code, "seconds": time.perf_counter() - started})
                yield len(programs) - len(missing) + index, len(programs)

    def latency_us(self, spec: TunableSpec, knobs: Mapping[str, Any]) -> float:
        """Of a measured kernel, microseconds; MeasurementError where it was not measured, or failed."""
        full = template_of(spec).check_knobs(spec, knobs)
        found = self._by_code.get(self._code(spec, canonical(full)))
        if found is None or not found.usable or found.latency_us is None:
            raise MeasurementError(
                f"the kernel with knobs {full} has no latency: {found.error if found else 'not measured'}; run the "
                "latency stage again, or measure with fewer --tiles"
            )
        return found.latency_us

    def seconds(self, spec: TunableSpec, knobs: Sequence[Mapping[str, Any]]) -> float:
        """What compiling and measuring one of these took, on average."""
        taken = {row["code"]: row["seconds"] for row in self.rows.read()}
        codes = {self._code(spec, canonical(template_of(spec).check_knobs(spec, point))) for point in knobs}
        known = [taken[code] for code in codes if code in taken] or list(taken.values())
        return statistics.fmean(known)

    @staticmethod
    def _code(spec: TunableSpec, knobs: str) -> str:
        code = code_key(spec, knobs)
        if code is None:
            raise MeasurementError(f"{type(spec).__name__} with knobs {knobs} makes no kernel")
        return code


def tuned_defaults(grid: Grid, table: KernelTable) -> NetworkSpace:
    """The space whose defaults are the best of the first :data:`TUNED` knobs: what a search knows when it begins."""
    defaults: dict[str, dict[int, dict[str, Any]]] = {}
    for layer, specs in grid.specs.items():
        for width, spec in specs.items():
            offered = {canonical(template_of(spec).check_knobs(spec, point)) for point in grid.points(layer)}
            ranked = Ranked().propose(kernel_space(spec), [], 4 * TUNED)
            tried = [knobs for knobs in ranked if canonical(knobs) in offered][:TUNED]
            best = min(tried, key=lambda knobs: table.latency_us(spec, knobs))
            defaults.setdefault(layer, {})[width] = best
    return replace(grid.space, defaults=defaults)


def latency_tables(grid: Grid, table: KernelTable) -> dict[str, Any]:
    """``{"kernels": [{"latency_us": by knobs, "seconds"}], "of": {layer: {bits: kernel}}}``, equal kernels once."""
    kernels: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    of: dict[str, dict[str, int]] = {}
    for layer, specs in grid.specs.items():
        points = grid.points(layer)
        for width, spec in specs.items():
            latencies = [float(f"{table.latency_us(spec, point):.4g}") for point in points]
            kernel = {"latency_us": latencies, "seconds": round(table.seconds(spec, points), 3)}
            index = place.setdefault(json.dumps(latencies), len(kernels))
            if index == len(kernels):
                kernels.append(kernel)
            of.setdefault(layer, {})[str(width)] = index
    return {"kernels": kernels, "of": of}


def wanted_conversions(structure: Structure, space: NetworkSpace, seed: int = 0) -> tuple[set[str], list[BitConfig]]:
    """All kernels without knobs that bits can bring about, and a few bit-configs that have them all."""
    rng, layers = np.random.default_rng(seed), tuple(space.bit_choices)
    found: set[str] = set()
    chosen = []
    drawn = [dict.fromkeys(layers, width) for width in WIDTHS]
    drawn += [dict(zip(layers, rng.choice(WIDTHS, len(layers)).tolist(), strict=True)) for _ in range(SAMPLED)]
    for bits in drawn:
        config = with_bits(space.base, bits)
        calls = set(structure.conversions(config))
        if calls - found:
            found |= calls
            chosen.append(config)
    return found, chosen


def measure_conversions(
    subject: Subject, structure: Structure, space: NetworkSpace, device: Device, folder: Path
) -> dict[str, float]:
    """``{operator and shape: microseconds}`` of all kernels without knobs; what ``conversions.jsonl`` has is kept."""
    rows = Rows(rows_folder(folder, device) / "conversions.jsonl")
    known = {row["call"]: row["latency_us"] for row in rows.read()}
    wanted, configs = wanted_conversions(structure, space)
    compiled: dict[str, Callable[..., Any]] = {}
    for config in configs:
        if not set(structure.conversions(config)) - set(known):
            continue
        graph = subject.graph(config)
        profile = KernelProfile(make_plan(graph, BuildOptions(subject.target)), graph.input_shape, compiled)
        profile.run(subject.images[:1].numpy())
        for call, arguments in profile.calls():
            name = conversion_name(call)
            if name is not None and name not in known:
                known[name] = _measure_call(call, arguments, subject.target, device)
                rows.append({"call": name, "latency_us": known[name]})
    missing = sorted(wanted - set(known))
    if missing:
        raise MeasurementError(f"no plan had the kernels {missing[:5]}; please report this with the network")
    return known


def conversion_name(call: Call) -> str | None:
    """As :meth:`Structure.conversions` names it; None: a kernel with knobs, or one that every network has."""
    if call.layer is not None or isinstance(call.spec, IslandSpec) or not hasattr(call.spec, "op"):
        return None
    if call.spec.op in ("pack", "logits", "unpack"):
        return None
    shape = call.spec.result
    operator = "requantize" if call.spec.op == "table" else call.spec.op
    return f"{operator} {shape.channels}x{shape.height}x{shape.width}"


def _measure_call(call: Call, arguments: Sequence[np.ndarray], target: CpuTarget, device: Device) -> float:
    import tvm
    from tvm.target import Target

    with temporary_folder() as place:

        def files() -> tuple[Path, Path]:
            library, stored = Path(place) / "kernel.so", Path(place) / "arguments.npz"
            function = call.function().with_attr("global_symbol", "main")
            link(tvm.compile(tvm.IRModule({"main": function}), target=Target(target.tvm)), library)
            save_arguments(stored, arguments[:-1], arguments[-1][:-SLACK])
            return library, stored

        return min(device.measure_kernel(Kernel(files, 1, call.spec, call.knobs)).samples_us)


def whole_points(space: NetworkSpace, n: int, seed: int = 1) -> list[dict[str, Any]]:
    """Points to check: the first half with random knobs, the second with the best known ones; bits as in a pool."""
    rng = np.random.default_rng(seed)
    points = space.candidates(n, rng)
    for index, point in enumerate(points):
        bits, _ = space.point(point)
        for layer, knobs in space.knobs.items():
            default = space.defaults[layer][bits[layer].activation]
            for knob, values in knobs.items():
                point[f"{layer}/{knob}"] = values[rng.integers(len(values))] if 2 * index < n else default[knob]
    return points


def measure_whole(
    subject: Subject, space: NetworkSpace, points: Sequence[Mapping[str, Any]], device: Device, folder: Path
) -> Iterator[int]:
    """Build and measure whole networks, the first :data:`AGAIN` a second time; ``whole.jsonl`` holds them.

    Yields:
        how many are left, first before anything is measured.
    """
    rows = Rows(rows_folder(folder, device) / "whole.jsonl")
    by_key = {point_key(point): point for point in points}
    wanted = [(key, 0) for key in by_key] + [(key, 1) for key in list(by_key)[:AGAIN]]
    done = {(row["point"], row["time"]) for row in rows.read()}
    left = [one for one in wanted if one not in done]
    yield len(left)
    for index, (key, again) in enumerate(left):
        bits, schedules = space.point(by_key[key])
        give_back_memory()
        started = time.perf_counter()
        artifact = device.build(subject.graph(bits), BuildOptions(subject.target), schedules)
        with temporary_folder() as place:
            artifact.save(Path(place) / "artifact")
            built = time.perf_counter()
            found = measure(Path(place) / "artifact", device, WHOLE_REPEATS, precision=0.01, limit_s=WHOLE_LIMIT_S)
        seconds = {"build": built - started, "measure": time.perf_counter() - built}
        rows.append({"point": key, "time": again, "latency_us": found.latency_us, "seconds": seconds})
        yield len(left) - index - 1


def measure_float(subject: Subject, device: Device, folder: Path) -> dict[str, float]:
    """Latency and size of the float network with its best known knobs, after tuning as before a search."""
    rows = Rows(rows_folder(folder, device) / "float.jsonl")
    if not rows.read():
        graph = subject.graph(BitConfig.uniform(subject.net, FLOAT_BITS, FLOAT_BITS))
        tune(graph, BuildOptions(subject.target), TUNED, None, device)
        artifact = device.build(graph, BuildOptions(subject.target))
        found = measure(artifact, device, WHOLE_REPEATS, precision=0.01, limit_s=WHOLE_LIMIT_S)
        rows.append({"latency_us": found.latency_us, "size_bytes": graph.size_bytes})
    return rows.read()[-1]


def correction_columns(parts: np.ndarray, cached_mb: float) -> np.ndarray:
    """What :data:`TERMS` multiply, ``(n, 6)``; caches hold so many megabytes of the constants.

    Parts are ``(n, 4)``: microseconds of kernels, of conversions, number of conversions, megabytes of constants.
    """
    beyond = np.maximum(0.0, parts[:, 3:] - cached_mb)
    return np.concatenate([np.ones((len(parts), 1)), parts, beyond], axis=1)


@dataclass(frozen=True)
class Correction:
    """From measured kernels to a whole network, where kernels find colder caches and each call takes time of its own.

    Kernels are measured alone, with all that they read in the fastest cache. In a network they meet weights that the
    last image left in a cache further away, or, of large networks, in memory.

    Args:
        factors: by :data:`TERMS`: microseconds, none, none, microseconds a call, a megabyte, a megabyte beyond.
        cached_mb: megabytes that caches hold from image to image.
    """

    factors: tuple[float, ...]
    cached_mb: float

    def apply(self, parts: np.ndarray) -> np.ndarray:
        """Latencies ``(n,)``, microseconds, of parts ``(n, 4)``."""
        return np.asarray(correction_columns(parts, self.cached_mb) @ np.array(self.factors))

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dict(zip(TERMS, self.factors, strict=True)), "cached_mb": self.cached_mb}

    @classmethod
    def from_record(cls, record: Mapping[str, float]) -> Correction:
        """Of :meth:`record`."""
        return cls(tuple(record[term] for term in TERMS), record["cached_mb"])


PLAIN = Correction((0.0, 1.0, 1.0, 0.0, 0.0, 0.0), 0.0)


def fit_correction(parts: np.ndarray, measured: np.ndarray) -> Correction:
    """The correction with the smallest errors. Kernels and conversions count as measured, so that knobs keep their say.

    Relative errors count, and outliers no more than in proportion (Huber's weights at twice the median error): a busy
    moment spoils a measurement upwards. No factor is below 0.

    Args:
        parts: ``(n, 4)``, of :meth:`~lightning_baqe.landscapes.measured.Landscape.parts`.
        measured: ``(n,)``, microseconds.
    """
    found = [_fit_factors(parts, measured, cached) for cached in CACHED_MB]
    return min(found, key=lambda one: float(np.abs(one.apply(parts) / measured - 1).mean()))


def _fit_factors(parts: np.ndarray, measured: np.ndarray, cached: float) -> Correction:
    columns = np.delete(correction_columns(parts, cached), (1, 2), axis=1) / measured[:, None]
    wanted = 1 - PLAIN.apply(parts) / measured
    weights, found = np.ones(len(measured)), np.zeros(columns.shape[1])
    for _ in range(REWEIGHTED):
        found = nnls(columns * weights[:, None], wanted * weights)[0]
        errors = np.abs(columns @ found - wanted)
        weights = np.sqrt(np.minimum(1.0, 2 * np.median(errors) / np.maximum(errors, 1e-9)))
    constant, *others = (float(value) for value in found)
    return Correction((constant, 1.0, 1.0, *others), cached)


def check_latency(parts: np.ndarray, measured: np.ndarray, folds: int = 5) -> dict[str, dict[str, float]]:
    """Errors of the plain sum, and of corrections that were fitted to other points.

    Returns:
        ``{"sum", "corrected": {"spearman", "median_relative_error", "mean_relative_error",
        "largest_relative_error"}}``.
    """
    held_out = np.empty(len(measured))
    for fold in range(folds):
        test = np.arange(len(measured)) % folds == fold
        held_out[test] = fit_correction(parts[~test], measured[~test]).apply(parts[test])
    found = {}
    for name, predicted in (("sum", PLAIN.apply(parts)), ("corrected", held_out)):
        relative = np.abs(predicted / measured - 1)
        found[name] = {
            "spearman": float(spearmanr(predicted, measured).statistic),
            "median_relative_error": float(np.median(relative)),
            "mean_relative_error": float(relative.mean()),
            "largest_relative_error": float(relative.max()),
        }
    return found
