"""Convolutions along one side only, as those of sequences are: ``(features, 1, steps)`` with kernels ``(1, k)``."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from small_graphs import INT8, UINT8, Maker, assert_exact, compiled, images, random_schedules

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, can_run, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.kernels.sample import sample_kernel
from lightning_baqe.kernels.specs import build_kernel
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.kernels.x86.layout import SLACK


@pytest.fixture(params=["native", "portable"])
def target(request: pytest.FixtureRequest) -> CpuTarget:
    return get_target(request.param)


def temporal(features: int, steps: int, seed: int = 0, upright: bool = False) -> Maker:
    """All kinds of convolutions along the steps, of rows if ``upright``."""
    maker = Maker(features, (steps, 1) if upright else (1, steps), seed=seed)

    def conv(
        source: str, out: int, taps: int = 3, stride: int = 1, dilation: int = 1, causal: bool = False, **fields: int
    ) -> str:
        reach = (taps - 1) * dilation
        before = reach if causal else reach // 2
        after = reach - before
        along = (before, after)
        kernel, strides, dilations = ((1, n) for n in (taps, stride, dilation))
        padding = (0, 0, *along)
        if upright:
            kernel, strides, dilations, padding = kernel[::-1], strides[::-1], dilations[::-1], (*along, 0, 0)
        return maker.conv(
            source,
            out,
            kernel,
            strides,
            padding,
            dilations,
            **{"limits": UINT8, **fields},  # type: ignore[arg-type]
        )

    stem = conv("x", 24, 5)
    conv("x", 24, 7, stride=2)
    conv("x", features, groups=features, dilation=2)
    value = conv(conv(stem, 24, dilation=4), 24, 2, dilation=8, causal=True)
    conv(value, 24, 3, stride=3, dilation=2, groups=3)
    conv(value, 24, 9, groups=24, stride=2)
    conv(value, 24, 3, groups=24, dilation=16)
    value = maker.concat(conv(value, 32, 1), conv(value, 16, 3), conv(stem, 20, 1, stride=1))
    conv(value, 5, 4, weight_bits=4)
    maker.conv(value, 7, 1, limits=INT8)
    maker.add(conv(value, 24, 3), stem)
    return maker


@pytest.mark.parametrize(("steps", "upright"), [(1, False), (2, True), (17, True), (1024, False)])
def test_any_number_of_steps(steps: int, upright: bool, target: CpuTarget) -> None:
    graph = temporal(13, steps, steps, upright).graph()
    schedules = random_schedules(graph, target, steps)
    assert_exact(compiled(graph, target, schedules), images(graph, 2))


@pytest.mark.parametrize(("channels", "steps"), [(1, 100), (3, 16), (80, 50)])
def test_floats_and_raw_signals(channels: int, steps: int, target: CpuTarget) -> None:
    maker = Maker(channels, (1, steps))
    maker.conv("x", 8, (1, 16), (1, 5), (0, 0, 8, 8))
    layer = {"layer": "f", "weight": maker.floats(6, channels, 1, 5), "bias": maker.floats(6), "relu": True}
    window = {"stride": (1, 2), "padding": (0, 0, 4, 2), "dilation": (1, 2), "groups": 1}
    maker.float_linear(maker.flatten(maker.float_node(ir.FloatConv, "input", **layer, **window)), 4)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


def test_the_halo_is_along_the_steps_alone() -> None:
    """A square one would be hundreds of rows of zeros about a sequence."""
    maker = temporal(16, 1024)
    plan = make_plan(maker.graph(), BuildOptions(get_target()))
    halos = [layout.halo for layout in plan.layouts.values()]
    assert {rows for rows, _ in halos} == {0}
    assert max(columns for _, columns in halos) == 16
    assert all(layout.length <= 1100 * layout.pitch + SLACK for layout in plan.layouts.values())


def test_every_kernel_can_be_tuned() -> None:
    """Each has knobs; random ones compute the sample that a tuner checks them with."""
    target = get_target()
    if not can_run(target.path):
        pytest.skip("this CPU does not run its own code")
    rng = np.random.default_rng(0)
    specs = make_plan(temporal(16, 50).graph(), BuildOptions(target)).tunable()
    assert len(set(specs.values())) > 8
    for spec in set(specs.values()):
        template = template_of(spec)
        space = template.knob_space(spec)
        knobs = template.check_knobs(spec, {name: values[rng.integers(len(values))] for name, values in space.items()})
        sample = sample_kernel(spec)
        arguments = [tvm.runtime.tensor(array) for array in sample.arguments(knobs)]
        out = tvm.runtime.empty((spec.result.length,), spec.result.dtype)
        kernel = tvm.compile(build_kernel(spec, knobs), target=tvm.target.Target(target.tvm))
        kernel["main"](*arguments, out)
        got = out.numpy()[: len(sample.result)]
        assert np.array_equal(got, sample.result), (spec, knobs)
