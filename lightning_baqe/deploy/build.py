"""Build: integer graph -> artifact."""

from __future__ import annotations

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.plan import Schedules, make_plan
from lightning_baqe.deploy.records import Records
from lightning_baqe.deploy.target import CpuTarget, get_target
from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.graph import IntegerGraph


def build(
    graph: IntegerGraph,
    target: str | CpuTarget = "native",
    schedules: Schedules | str | None = None,
    threads: int = 1,
    records: Records | None = None,
    fuse_residual: bool = True,
) -> Artifact:
    """Compile a graph for batch 1.

    Args:
        graph: from :func:`lightning_baqe.lower`.
        target: ``native``, ``vnni512``, ``avxvnni``, ``avx2``, ``portable``.
        schedules: ``{layer: {knob: value}}``; a layer that is missing takes the best knobs in the records, or the
            template's default. ``"default"``: the template's defaults for all.
        threads: of every convolution.
        records: the database to look in; by default the user's.
        fuse_residual: whether a convolution's kernel may end with a residual sum; else sums have kernels of their own.

    Returns:
        the artifact, whose outputs equal the graph's.

    Raises:
        ConfigError: an unknown layer, knob or value.
        BuildError: an operator without a kernel, or a target that cannot be compiled for.
    """
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if isinstance(schedules, str) and schedules != "default":
        raise ConfigError(f"schedules is a mapping, 'default' or None, got {schedules!r}")
    chosen = get_target(target) if isinstance(target, str) else target
    if schedules == "default":
        plan = make_plan(graph, chosen, None, threads, fuse_residual=fuse_residual)
    else:
        assert not isinstance(schedules, str)
        known = records if records is not None else Records()
        plan = make_plan(
            graph, chosen, schedules, threads, lambda spec: known.best_knobs(spec, chosen), fuse_residual=fuse_residual
        )
    return Artifact(graph, plan, compile_plan(plan, graph.input_shape))
