"""Planning: knobs by layer, digests, refusals."""

from __future__ import annotations

import pytest
import torch
import tvm.error
from expressions import chain
from small_graphs import Maker

from lightning_baqe.deploy import compiler
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.measurement.build import build

TARGET = get_target("vnni512")


def small(seed: int = 0, weight_bits: int = 8) -> IntegerGraph:
    maker = Maker(16, 8, seed=seed)
    first = maker.conv(out=64, padding=1, name="first", weight_bits=weight_bits)
    maker.conv(first, out=32, padding=1, name="second", weight_bits=weight_bits)
    return maker.graph()


def test_an_unknown_layer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"frist.*first"):
        make_plan(small(), BuildOptions(TARGET), {"frist": {"unroll": 1}})


@pytest.mark.parametrize("knobs", [{"speed": 3}, {"tile": "99x1x1"}, {"unroll": 5}, {"order": "random"}])
def test_wrong_knobs_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_plan(small(), BuildOptions(TARGET), {"first": knobs})


def test_given_knobs_win_over_known_ones_and_those_over_defaults() -> None:
    plan = make_plan(small(), BuildOptions(TARGET), {"first": {"tile": "1x1x2"}}, best=lambda spec: {"tile": "2x1x1"})
    assert {layer: knobs["tile"] for layer, knobs in plan.schedules.items()} == {"first": "1x1x2", "second": "2x1x1"}
    assert set(plan.schedules["first"]) == {"tile", "order", "unroll", "weights", "reduction", "intrinsic"}


def test_the_digest_tells_code_not_weights() -> None:
    digest = make_plan(small(0), BuildOptions(TARGET)).digest
    assert make_plan(small(1), BuildOptions(TARGET)).digest == digest
    assert make_plan(small(0), BuildOptions(TARGET), {"first": {"order": "pixels"}}).digest != digest
    assert make_plan(small(0), BuildOptions(TARGET, threads=2)).digest != digest
    assert make_plan(small(0), BuildOptions(get_target("avx2"))).digest != digest


def test_bits_that_need_no_other_code_share_it() -> None:
    digests = {bits: make_plan(small(0, bits), BuildOptions(TARGET)).digest for bits in (2, 4, 5, 8)}
    assert digests[2] == digests[4]
    assert digests[5] == digests[8]


def test_equal_layers_share_a_kernel() -> None:
    maker = Maker(16, 8)
    value = maker.conv(out=16, padding=1)
    for _ in range(3):
        value = maker.conv(value, out=16, padding=1)
    maker.conv(value, out=16, padding=1, limits=None)
    keys = [
        call.key for call in make_plan(maker.graph(), BuildOptions(TARGET)).calls if isinstance(call.spec, ConvSpec)
    ]
    assert len(keys) == 5
    assert len(set(keys)) == 2


def test_a_network_that_ends_in_integers_is_refused() -> None:
    maker = Maker(16, 8)
    maker.conv(out=16, padding=1)
    graph = maker.graph()
    with pytest.raises(BuildError, match="Dequantize"):
        make_plan(IntegerGraph(graph.nodes[:-1], graph.bits), BuildOptions(TARGET))


def test_operators_without_a_kernel_are_named() -> None:
    graph = small()
    unknown = ir.FloatFunction(name="odd", inputs=("input",), type=graph.nodes[0].type, steps=chain(("lgamma",)))
    with pytest.raises(BuildError, match=r"odd.*gamma.*relu"):
        make_plan(IntegerGraph((graph.nodes[0], unknown), {}), BuildOptions(TARGET))


def test_targets() -> None:
    assert get_target("avx2").path == "avx2"
    assert isinstance(get_target(), CpuTarget)
    with pytest.raises(BuildError, match="portable"):
        get_target("gpu")


def test_build_checks_its_arguments() -> None:
    with pytest.raises(ConfigError, match="threads"):
        build(small(), threads=0)
    with pytest.raises(ConfigError, match="schedules"):
        build(small(), schedules="fast")


def test_build_runs() -> None:
    graph = small()
    x = torch.randn(2, 16, 8, 8)
    artifact = build(graph)
    assert torch.equal(artifact.run(x), graph.run(x))
    with pytest.raises(ConfigError, match="shape"):
        artifact.run(torch.zeros(1, 3, 8, 8))


def test_what_tvm_refuses_is_a_build_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise tvm.error.InternalError("no such instruction")

    monkeypatch.setattr(compiler.relax, "build", refuse)
    with pytest.raises(BuildError, match="no such instruction"):
        compiler.compile_plan(make_plan(small(), BuildOptions(TARGET)), (16, 8, 8))


def test_one_loop_over_kernels_with_knobs() -> None:
    maker = Maker(16, 8)
    first, second = maker.conv(out=16), maker.conv(out=16, groups=16)
    maker.concat(first, second)
    plan = make_plan(maker.graph(), BuildOptions(TARGET))
    found = plan.tunable()
    assert list(found) == list(plan.schedules)
    assert all(not spec.source.shared and not spec.result.shared for spec in found.values())
    assert any(layout.shared for layout in plan.layouts.values())


def test_planning_packs_nothing() -> None:
    maker = Maker(16, 8)
    maker.conv(maker.conv(out=16), out=16, groups=16)
    plan = make_plan(maker.graph(), BuildOptions(TARGET))
    assert not plan.constants.made
    assert {a for call in plan.calls for a in call.arguments} >= set(plan.constants)
    arrays = compiler.constants(plan)
    assert len(arrays) == len(plan.constants) == len(plan.constants.made)
    assert all(a is b for a, b in zip(arrays, compiler.constants(plan), strict=True))
