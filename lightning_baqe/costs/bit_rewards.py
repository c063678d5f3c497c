"""What a device rewards: from the records, what each bit-width buys in latency, kernel by kernel.

Fewer bits always buy storage: an artifact's weights are packed to their bits, 5 bits take 5/8 of 8 bits
(:attr:`IntegerGraph.size_bytes` counts them so). Latency they buy only where the arithmetic has a faster way for them:
on a CPU with VNNI all widths run the same instructions, on one with AVX2 alone fewer bits allow longer chains of int16
sums (:mod:`lightning_baqe.kernels.x86.arithmetic`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.tunable import TunableSpec, template_of
from lightning_baqe.measurement.database import Records, canonical, code_key

REFERENCE = 8
PAPER_CHOICES = (4, 8, 32)
WIDTHS = (4, 5, 6, 7, 8)
GAIN = 1.05  # speedup from which a width buys latency; below, a figure is within the noise of a quiet machine


@dataclass(frozen=True)
class KernelReward:
    """One kernel of a network at several bit-widths.

    Args:
        layers: that call it.
        spec: of the kernel at 8 bit.
        latency_us: ``{bits: best known latency}``; bits that were not measured are missing.
        same: bits whose fastest code is, instruction for instruction, that of 8 bit.
    """

    layers: tuple[str, ...]
    spec: TunableSpec
    latency_us: Mapping[int, float]
    same: tuple[int, ...] = ()

    def speedup(self, bits: int) -> float | None:
        """Latency at 8 bit over latency at these bits; None where one is unknown."""
        if REFERENCE not in self.latency_us or bits not in self.latency_us:
            return None
        return self.latency_us[REFERENCE] / self.latency_us[bits]


@dataclass(frozen=True)
class Rewards:
    """What bit-widths buy for one network on one device.

    Args:
        path: of the target's arithmetic.
        widths: that were compared, ascending.
        kernels: those whose bits differ, most work first.
        storage: ``{bits: bytes of the network over those at 8 bit}``.
    """

    path: str
    widths: tuple[int, ...]
    kernels: tuple[KernelReward, ...]
    storage: Mapping[int, float]

    def speedup(self, bits: int) -> float | None:
        """Over all layers whose kernels are known at both: time at 8 bit over time at these bits; None: none is known.

        Sums of latencies, not means of ratios: a kernel counts as much as it takes.
        """
        known = [k for k in self.kernels if k.speedup(bits) is not None]
        if not known:
            return None
        reference, found = (sum(len(k.layers) * k.latency_us[b] for k in known) for b in (REFERENCE, bits))
        return reference / found

    @property
    def line(self) -> str:
        """One line for people; empty where no latency is known."""
        parts = []
        for bits in self.widths:
            speedup = self.speedup(bits)
            if bits != REFERENCE and speedup is not None:
                speed = f"{speedup:.2f}x the speed" if abs(speedup - 1) >= GAIN - 1 else "no latency"
                parts.append(f"{bits} bit buys {speed} and {self.storage[bits]:.2f}x the size")
        return f"{'; '.join(parts)} (of 8 bit, {self.path})" if parts else ""

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` holds it."""
        return {
            "path": self.path,
            "line": self.line,
            "widths": {str(b): {"speedup": self.speedup(b), "storage": self.storage[b]} for b in self.widths},
        }


def rewards_of(graphs: Mapping[int, IntegerGraph], options: BuildOptions, records: Records) -> Rewards:
    """What the records say of a network's kernels.

    A record counts for every bit-width at which the template generates the same code: what is one program has one
    latency, and no noise makes a difference.

    Args:
        graphs: ``{bits: the network with its searched layers at these bits}``, 8 among them.
        options: what the kernels are compiled for.
        records: where latencies are looked up; nothing is measured.

    Raises:
        ConfigError: the network at 8 bit is missing.
    """
    kernels = []
    for layers, specs in searched_kernels(graphs, options):
        best = fastest_codes(specs, options.target, records)
        same = tuple(bits for bits, one in best.items() if REFERENCE in best and one.code == best[REFERENCE].code)
        known = {bits: one.latency_us for bits, one in best.items()}
        kernels.append(KernelReward(layers, specs[REFERENCE], known, same))
    kernels.sort(key=lambda kernel: -len(kernel.layers) * kernel.spec.macs)
    size = graphs[REFERENCE].size_bytes
    storage = {bits: graph.size_bytes / size for bits, graph in graphs.items()}
    return Rewards(options.target.path, tuple(sorted(graphs)), tuple(kernels), storage)


def searched_kernels(
    graphs: Mapping[int, IntegerGraph], options: BuildOptions
) -> list[tuple[tuple[str, ...], dict[int, TunableSpec]]]:
    """The distinct kernels, dense and depthwise, of the layers whose bits a search chooses: those that each graph has
    at its own bits.

    Args:
        graphs: ``{bits: the network with its searched layers at these bits}``, 8 among them.
        options: what the kernels are compiled for.

    Returns:
        Of each kernel the layers that call it, and ``{bits: the kernel}``.

    Raises:
        ConfigError: the network at 8 bit is missing.
    """
    if REFERENCE not in graphs:
        raise ConfigError(f"rewards compare with {REFERENCE} bit; got graphs at {sorted(graphs)}: add {REFERENCE}")
    widths = tuple(sorted(graphs))
    specs = {bits: make_plan(graphs[bits], options).tunable() for bits in widths}
    groups: dict[tuple[TunableSpec, ...], list[str]] = {}
    for layer in specs[REFERENCE]:
        if all(layer in specs[b] and graphs[b].bits.get(layer, (0, 0))[0] == b for b in widths):
            groups.setdefault(tuple(specs[b][layer] for b in widths), []).append(layer)
    return [(tuple(layers), dict(zip(widths, key, strict=True))) for key, layers in groups.items()]


@dataclass(frozen=True)
class Fastest:
    """The fastest code that is known of a kernel at one bit-width.

    Args:
        spec, knobs: that generate it, at this bit-width; it may have been measured at another.
        code: identifies it.
        latency_us: its figure.
        samples: that the figure was taken from.
    """

    spec: TunableSpec
    knobs: dict[str, Any]
    code: str
    latency_us: float
    samples: int


def fastest_codes(specs: Mapping[int, TunableSpec], target: CpuTarget, records: Records) -> dict[int, Fastest]:
    """``{bits: the fastest code of the kernel}``, as the records know it; unknown bits are missing.

    What one bit-width was measured with is a choice of all others, too, where it generates code that was measured. Of
    several figures of one code the one with the most samples counts.
    """
    by_code: dict[str, tuple[int, float]] = {}  # minus samples and latency: the least is the figure that counts
    knobs: set[str] = set()
    for spec in set(specs.values()):
        for record in records.kernels(spec, target):
            if record.usable and record.latency_us is not None:
                text = canonical(record.knobs)
                code = code_key(spec, text) or ""
                figure = (-len(record.samples_us), record.latency_us)
                by_code[code] = min(figure, by_code.get(code, figure))
                knobs.add(text)
    found = {}
    for bits, spec in specs.items():
        codes: dict[str, str] = {}
        for text in sorted(knobs):
            generated = code_key(spec, text)
            if generated is not None and generated in by_code:
                codes.setdefault(generated, text)
        best = min(codes, key=lambda code: (by_code[code][1], code), default=None)
        if best is not None:
            chosen = template_of(spec).check_knobs(spec, json.loads(codes[best]))
            found[bits] = Fastest(spec, chosen, best, by_code[best][1], -by_code[best][0])
    return found


def default_bit_choices(rewards: Rewards | None, mode: str, size_counts: bool = True) -> tuple[int, ...]:
    """The bits that a search should offer each layer, where nobody chose them.

    Mode ``paper`` keeps BAQE's 4, 8 and 32. Otherwise, from wide to narrow, 8 bit is kept, and then each width that is
    at least :data:`GAIN` times as fast over the network as every wider one that is kept. A width that buys no latency
    is smaller all the same, since artifacts are packed to the bit; but any size between those of two widths is
    had by giving some layers the one and some the other, so that where size is an objective only the narrowest width
    is kept for its storage, and those between are dropped: no faster, less accurate than the wider and larger than the
    narrower one. Where size does not count it is dropped, too. 32 (float) is neither faster nor smaller and must be
    asked for.

    Args:
        rewards: from :func:`rewards_of`; None is only good for the paper's mode.
        mode: of the search.
        size_counts: whether size is an objective.

    Raises:
        ConfigError: no rewards, or no latency is known at some width.
    """
    if mode == "paper":
        return PAPER_CHOICES
    if rewards is None:
        raise ConfigError(f"bit choices of mode {mode!r} come from what the device rewards; got no rewards")
    found = {bits: rewards.speedup(bits) for bits in rewards.widths}
    unknown = [bits for bits, speedup in found.items() if speedup is None]
    if unknown:
        raise ConfigError(
            f"no kernel is measured at {unknown} bit and at {REFERENCE}: give search.tune_s > 0, "
            "tune first (python -m lightning_baqe.benchmarks.rewards), or give bit_choices"
        )
    speedups = {bits: speedup for bits, speedup in found.items() if speedup is not None and bits <= REFERENCE}
    kept = [REFERENCE]
    for bits in sorted(set(speedups) - {REFERENCE}, reverse=True):
        if all(speedups[bits] >= GAIN * speedups[wider] for wider in kept):
            kept.append(bits)
    if size_counts and min(speedups) not in kept:
        kept.append(min(speedups))
    return tuple(sorted(kept))
