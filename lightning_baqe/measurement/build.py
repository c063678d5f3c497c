"""Build: integer graph -> artifact."""

from __future__ import annotations

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.plan import Schedules, make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.measurement.database import Records


def build(
    graph: IntegerGraph,
    target: str | CpuTarget = "native",
    schedules: Schedules | str | None = None,
    threads: int = 1,
    records: Records | None = None,
) -> Artifact:
    """Compile a graph for batch 1.

    Args:
        graph: from :func:`lightning_baqe.lower`.
        target: ``native``, ``amx``, ``vnni512``, ``avxvnni``, ``avx2``, ``portable``.
        schedules: ``{layer: {knob: value}}``; a layer that is missing takes the best knobs in the records, or the
            template's default. ``"default"``: the template's defaults for all.
        threads: of every convolution.
        records: the database to look in; by default the user's.

    Returns:
        the artifact, whose outputs equal the graph's.

    Raises:
        ConfigError: an unknown layer, knob or value.
        BuildError: an operator without a kernel, or a target that cannot be compiled for.
    """
    chosen = get_target(target) if isinstance(target, str) else target
    return build_with(graph, BuildOptions(chosen, threads), schedules, records)


def build_with(
    graph: IntegerGraph,
    options: BuildOptions,
    schedules: Schedules | str | None = None,
    records: Records | None = None,
) -> Artifact:
    """:func:`build` where all options are one value."""
    plan = choose_plan(graph, options, schedules, records)
    return Artifact(graph, plan, compile_plan(plan, graph.input_shape))


def choose_plan(
    graph: IntegerGraph, options: BuildOptions, schedules: Schedules | str | None, records: Records | None
) -> Plan:
    """The kernels of :func:`build_with`, not yet compiled."""
    if isinstance(schedules, str):
        if schedules != "default":
            raise ConfigError(f"schedules is a mapping, 'default' or None, got {schedules!r}")
        return make_plan(graph, options)
    known = records if records is not None else Records()
    return make_plan(graph, options, schedules, lambda spec: known.best_knobs(spec, options.target))
