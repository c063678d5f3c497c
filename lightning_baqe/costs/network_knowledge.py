"""What a search over a network knows before it trains anything: sizes, latencies of kernels, sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph, node_bytes
from lightning_baqe.kernels.tunable import TunableSpec
from lightning_baqe.measurement.database import Records
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.quantization.sharing import Shared
from lightning_baqe.search.knowledge import Group, Knowledge, Sum
from lightning_baqe.tuning.network_space import NetworkSpace

NEGLIGIBLE = 1e-3  # of the float network's size


def search_knowledge(
    space: NetworkSpace,
    graphs: Mapping[int, IntegerGraph],
    reference: Mapping[str, Any],
    options: BuildOptions,
    records: Records,
    scores: Mapping[int, Mapping[str, float]] | None = None,
    shared: Sequence[Shared] = (),
) -> Knowledge:
    """Knowledge about error, latency and size of the points of a space, the last two relative to the float network.

    Size is exact, to within 0.1 % of the float network's, where no layer may stay float. Latency is the sum of the best
    known latencies of all kernels with knobs; what the others take is estimated by what they take of the float network.
    What a conversion takes is learned from trials.
    Schedules are not searched: every layer gets the best known one for its bits.

    Args:
        space: of the search.
        graphs: ``{bits: the network with its searched layers at these bits}``, all choices of the space.
        reference: ``latency_us`` and ``size_bytes`` of the float network.
        options: what the kernels are compiled for.
        records: of the kernels.
        scores: ``{bits: {layer: sensitivity}}``, of any scale; None: all that is known of the error is that it depends
            on bits alone.

    Raises:
        ConfigError: a choice of the space has no graph.
    """
    choices = {bits for offered in space.bit_choices.values() for bits in offered}
    missing = sorted(choices - set(graphs))
    if missing:
        raise ConfigError(f"the space offers {missing} bits, but there are graphs at {sorted(graphs)} alone")
    names = tuple(f"{leader}/bits" for leader in space.bit_choices)
    terms = {} if scores is None else _terms(space, {bits: scores.get(bits, {}) for bits in choices})
    latency = _latency(space, graphs, float(reference["latency_us"]), options, records)
    if latency is not None:
        latency = replace(latency, groups=conversion_groups(space, shared))
    size = _size(space, graphs, float(reference["size_bytes"]))
    return Knowledge([Sum(terms, 0.0, "score", names), latency, size], *best_schedules(space))


def conversion_groups(space: NetworkSpace, shared: Sequence[Shared]) -> tuple[Group, ...]:
    """Where conversions come from, as groups of parameters: each different value beyond the first is about one.

    A tensor with several readers is a group; a layer whose bits are not searched stands as a value. A float layer among
    integer ones has its input dequantized and its output quantized: two more, less where float layers meet.
    """
    leader = _leaders(space)
    found = []
    for layers, beside in shared:
        names = dict.fromkeys(f"{leader[layer]}/bits" for layer in layers if layer in leader)
        values = {*beside, *(space.base[layer].activation for layer in layers if layer not in leader)}
        if names and len(names) + len(values) > 1:
            found.append((tuple(names), tuple(sorted(values))))
    for first, offered in space.bit_choices.items():
        integers = tuple(bits for bits in offered if bits != FLOAT_BITS)
        if integers and len(integers) < len(offered):
            found += 2 * len(tied_to(space, first)) * [((f"{first}/bits",), integers)]
    return tuple(found)


def best_schedules(space: NetworkSpace) -> tuple[dict[str, dict[int, dict[str, Any]]], dict[str, Any]]:
    """A space's default knobs as :class:`~lightning_baqe.search.knowledge.Knowledge` takes them.

    Returns:
        ``best``: ``{"<leader>/bits": {bits: {"<layer>/<knob>": value}}}`` of the searched layers and those tied to
        them, and ``fixed``: of all others.
    """
    best = {
        f"{leader}/bits": {
            bits: {
                f"{layer}/{knob}": space.defaults[layer][bits][knob]
                for layer in tied_to(space, leader)
                for knob in space.knobs.get(layer, {})
                if knob in space.defaults[layer].get(bits, {})
            }
            for bits in offered
        }
        for leader, offered in space.bit_choices.items()
    }
    followed = _leaders(space)
    fixed = {
        f"{layer}/{knob}": space.defaults[layer][space.base[layer].activation][knob]
        for layer, knobs in space.knobs.items()
        if layer not in followed
        for knob in knobs
    }
    return best, fixed


def tied_to(space: NetworkSpace, leader: str) -> tuple[str, ...]:
    """The layers that get a searched layer's bits, itself among them."""
    return next((group for group in space.base.ties if leader in group), (leader,))


def _leaders(space: NetworkSpace) -> dict[str, str]:
    """``{layer: the searched layer whose bits it gets}``."""
    return {layer: leader for leader in space.bit_choices for layer in tied_to(space, leader)}


def _terms(space: NetworkSpace, by_bits: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {
        f"{leader}/bits": {
            bits: sum(by_bits[bits].get(layer, 0.0) for layer in tied_to(space, leader)) for bits in offered
        }
        for leader, offered in space.bit_choices.items()
    }


def _size(space: NetworkSpace, graphs: Mapping[int, IntegerGraph], total: float) -> Sum:
    searched = _leaders(space)
    own = {
        bits: {node.layer: node_bytes(node) / total for node in graph if getattr(node, "layer", None) in searched}  # type: ignore[attr-defined]
        for bits, graph in graphs.items()
    }
    rest = {bits: graph.size_bytes / total - sum(own[bits].values()) for bits, graph in graphs.items()}
    offered = {bits for choices in space.bit_choices.values() for bits in choices}
    integer = [rest[bits] for bits in offered if bits != FLOAT_BITS] or [rest[FLOAT_BITS]]
    # Narrower readers of a tensor bring a requantization, a few bytes each: no search notices.
    exact = FLOAT_BITS not in offered and max(integer) - min(integer) < NEGLIGIBLE
    return Sum(_terms(space, own), sum(integer) / len(integer), "exact" if exact else "estimate")


def _latency(
    space: NetworkSpace, graphs: Mapping[int, IntegerGraph], total: float, options: BuildOptions, records: Records
) -> Sum | None:
    """None where the records hold no kernel of the network."""
    known: dict[int, dict[str, float]] = {}
    specs: dict[int, dict[str, TunableSpec]] = {}
    for bits, graph in graphs.items():
        specs[bits] = make_plan(graph, options).tunable()
        known[bits] = {}
        for layer, spec in specs[bits].items():
            knobs = space.defaults.get(layer, {}).get(bits)
            record = records.kernel(spec, options.target, dict(knobs)) if knobs else None
            if record is not None and record.usable and record.latency_us is not None:
                known[bits][layer] = record.latency_us / total
    if not any(known.values()):
        return None
    for bits, found in known.items():
        source = found or next(filter(None, known.values()))
        layers = [layer for layer in source if layer in specs[bits]]
        pace = sum(source[layer] for layer in layers) / max(sum(specs[bits][layer].macs for layer in layers), 1)
        for layer, spec in specs[bits].items():
            found.setdefault(layer, pace * spec.macs)
    searched, float_known = _leaders(space), known.get(FLOAT_BITS, {})
    others = max(0.0, 1.0 - sum(float_known.values())) if float_known else 0.0
    kept = {layer: bits.activation for layer, bits in space.base.items() if layer not in searched}
    offset = others + sum(known.get(bits, {}).get(layer, 0.0) for layer, bits in kept.items())
    return Sum(_terms(space, known), offset)
