"""Float operators between integer nodes: compiled together, exact around them, kept, loaded, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_graphs import Maker, assert_exact, compiled, float_errors, images

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.objects import KernelObjects
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.plan_islands import find_islands
from lightning_baqe.deploy.storage import sealed
from lightning_baqe.deploy.verify import verify
from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.islands import IslandSpec, can_compile
from lightning_baqe.measurement.profile import KernelProfile

TARGET = get_target()
TOLERANCE = 1e-5  # of the largest value


def attention() -> IntegerGraph:
    """A transformer's block on a convolution's values: two islands, each with several results and a residual sum that
    goes round the integer layers between them.
    """
    maker = Maker(8, (7, 6))
    real = maker.dequantize(maker.conv(out=24, padding=1), 0.02)  # (24, 7, 6)
    tokens = maker.operator("flatten.using_ints", [real], "%0", 2)
    tokens = maker.operator("permute.default", [tokens], "%0", [0, 2, 1])  # (1, 42, 24)
    norm = {"w": maker.floats(24), "b": maker.floats(24)}
    normed = maker.operator("layer_norm.default", [tokens], "%0", [24], "@w", "@b", 1e-5, constants=norm)
    image = maker.operator("permute.default", [normed], "%0", [0, 2, 1])
    image = maker.operator("reshape.default", [image], "%0", [1, 24, 7, 6])
    step = maker.quantize(image, 40.0, 128)
    heads = []
    for _ in range(3):
        part = maker.dequantize(maker.conv(step, out=24, kernel=1), 0.02)
        part = maker.operator("reshape.default", [part], "%0", [1, 2, 12, 42])
        heads.append(maker.operator("permute.default", [part], "%0", [0, 1, 3, 2]))
    out = maker.operator("scaled_dot_product_attention.default", heads, "%0", "%1", "%2")
    out = maker.operator("permute.default", [out], "%0", [0, 2, 1, 3])
    out = maker.operator("reshape.default", [out], "%0", [1, 42, 24])
    total = maker.operator("add.Tensor", [tokens, out], "%0", "%1")
    out = maker.operator("gelu.default", [total], "%0")
    out = maker.operator("permute.default", [out], "%0", [0, 2, 1])
    out = maker.operator("reshape.default", [out], "%0", [1, 24, 7, 6])
    maker.conv(maker.quantize(out, 20.0, 128), out=16, padding=1)
    return maker.graph()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_transformers_block(threads: int, tmp_path: Path) -> None:
    graph = attention()
    assert not graph.is_integer_only
    artifact = compiled(graph, TARGET, threads=threads)
    x = images(graph, 2)
    assert_exact(artifact, x)
    islands = [call for call in artifact.plan.calls if isinstance(call.spec, IslandSpec)]
    assert [len(call.nodes) for call in islands] == [5, 13]
    assert [len(call.results) for call in islands] == [2, 1]  # the tokens go on to the sum
    # Between a dequantization and an island, and an island and a quantization, nothing else happens.
    assert sorted(call.spec.op for call in artifact.plan.calls if call.layer is None) == sorted(
        ["pack", *["logits"] * 4, *["island"] * 2, *["pack"] * 2, "logits"]
    )
    kept = Artifact.load(artifact.save(tmp_path / "artifact"))
    assert torch.equal(kept.run(x), artifact.run(x))
    assert kept.graph.size_bytes == graph.size_bytes
    assert torch.equal(kept.graph.run(x), graph.run(x))
    assert kept.plan.digest == artifact.plan.digest


def test_the_profile_runs_islands() -> None:
    graph = attention()
    plan = make_plan(graph, BuildOptions(TARGET))
    x = images(graph)
    assert torch.equal(
        torch.from_numpy(KernelProfile(plan, graph.input_shape).run(x.numpy())),
        Artifact(graph, plan, compile_plan(plan, graph.input_shape)).run(x).flatten(1),
    )


UNARY = {
    "layer_norm": ("layer_norm.default", ("%0", [6, 5], None, None, 1e-6)),
    "group_norm": ("group_norm.default", ("%0", 3, "@w", "@b", 1e-5)),
    "instance_norm": ("instance_norm.default", ("%0", "@w", "@b", None, None, True, 0.1, 1e-5, False)),
    "softmax": ("softmax.int", ("%0", -1)),
    "softmax over channels": ("softmax.int", ("%0", 1)),
    "log_softmax": ("log_softmax.int", ("%0", 1)),
    "gelu": ("gelu.default", ("%0",)),
    "gelu by tanh": ("gelu.default", ("%0",)),
    "silu": ("silu.default", ("%0",)),
    "mean": ("mean.dim", ("%0", [2, 3], True)),
    "norm": ("linalg_vector_norm.default", ("%0", 2, [1], True)),
    "exp": ("exp.default", ("%0",)),
    "amax": ("amax.default", ("%0", [1], True)),
    "logsumexp": ("logsumexp.default", ("%0", [1], True)),
    "masked_fill": ("masked_fill.Scalar", ("%0", "@m", -1e9)),
    "select": ("select.int", ("%0", 1, -2)),
    "slice from the end": ("slice.Tensor", ("%0", 1, -7, -2)),
    "narrow from the end": ("narrow.default", ("%0", 1, -4, 3)),
    "tanh": ("tanh.default", ("%0",)),
    "sigmoid": ("sigmoid.default", ("%0",)),
    "pad": ("pad.default", ("%0", [1, 2, 0, 1], "reflect", None)),
    "bicubic": ("upsample_bicubic2d.vec", ("%0", [13, 10], False, None)),
    "linear": ("linear.default", ("%0", "@l")),
    "einsum": ("einsum.default", ("bchw,bdhw->bcd", ["%0", "%0"])),
    "attention with a mask": ("scaled_dot_product_attention.default", ("%0", "%0", "%0", "@a")),
    "causal attention": ("scaled_dot_product_attention.default", ("%0", "%0", "%0", None, 0.0, True)),
    "roll": ("roll.default", ("%0", [2, -1], [2, 3])),
    "index": ("index.Tensor", ("%0", [None, None, "@i"])),
}


@pytest.mark.parametrize("what", list(UNARY))
def test_one_operator(what: str) -> None:
    maker = Maker(8, (6, 5))
    real = maker.dequantize(maker.conv(out=18, padding=1), 0.02)
    name, arguments = UNARY[what]
    constants = {
        "w": maker.floats(18), "b": maker.floats(18), "i": torch.tensor([3, 0, 1, 5]), "m": maker.floats(6, 5) > 0,
        "l": maker.floats(7, 5), "a": maker.floats(6, 6),
    }  # fmt: skip
    used = {key: value for key, value in constants.items() if f"'@{key}'" in repr(arguments)}
    options = {"approximate": "tanh"} if "by tanh" in what else {}
    out = maker.operator(name, [real], *arguments, constants=used, **options)
    maker.conv(maker.quantize(out, 30.0, 100), out=8, kernel=1)
    graph = maker.graph()
    assert can_compile(graph[out])  # type: ignore[arg-type]
    assert_exact(compiled(graph, TARGET), images(graph))


@pytest.mark.parametrize("sizes", [(2, 7, 5, 9), (3, 16, 32, 16), (1, 49, 49, 64), (1, 33, 197, 13), (4, 1, 20, 1)])
def test_matrix_products(sizes: tuple[int, int, int, int]) -> None:
    """Of all sizes, with a batch or none."""
    batch, rows, inner, columns = sizes
    maker = Maker(8, 4)
    value = maker.linear(maker.flatten("x"), batch * (rows + columns) * inner, (0, 255))
    real = maker.dequantize(maker.flatten(value), 0.01)
    parts, first = [], 0
    for shape in ((batch, rows, inner), (batch, inner, columns)):
        size = shape[0] * shape[1] * shape[2]
        part = maker.operator("slice.Tensor", [real], "%0", 1, first, first + size)
        parts.append(maker.operator("reshape.default", [part], "%0", list(shape)))
        first += size
    out = maker.operator("bmm.default", parts, "%0", "%1")
    maker.quantize(out)
    graph = maker.graph()
    assert graph.macs == batch * rows * inner * columns + 128 * batch * (rows + columns) * inner
    assert_exact(compiled(graph, TARGET), images(graph))


def test_an_island_reads_the_image_and_ends_the_network() -> None:
    maker = Maker(3, (5, 4))
    pooled = maker.operator("softmax.int", ["input"], "%0", 3)
    maker.float_conv(pooled, 4, padding=1)  # reads an island's value in our layout
    more = maker.float_conv("input", 4, padding=1)
    both = maker.operator("matmul.default", [more, maker.nodes[-2].name], "%0", "%1", shapes=[(4, 5, 4), (4, 4, 5)])
    maker.operator("log_softmax.int", [both], "%0", 2)
    graph = maker.graph()
    x = images(graph, 3)
    artifact = compiled(graph, TARGET)
    assert_exact(artifact, x)
    assert torch.allclose(artifact.run(x), graph.run(x), atol=1e-4)
    assert list(float_errors(artifact, x)) == [node.name for node in graph if node.is_float]


def test_a_value_that_both_read() -> None:
    """A dequantized value goes to an island and to a kernel; an island's value to another network part, padded."""
    maker = Maker(4, 6)
    real = maker.dequantize(maker.conv(out=20, padding=1), 0.02)
    normed = maker.operator("layer_norm.default", [real], "%0", [20, 6, 6])
    total = maker.float_node(ir.FloatAdd, real, normed, relu=True)
    joined = maker.float_node(ir.Concat, normed, total)
    maker.float_conv(joined, 5, padding=1)
    graph = maker.graph()
    artifact = compiled(graph, TARGET)
    assert_exact(artifact, images(graph))


def test_islands_never_wait_for_themselves() -> None:
    graph = attention()
    order, islands = find_islands(graph)
    assert sorted(node.name for node in order) == sorted(node.name for node in graph)
    done: set[str] = set()
    inside = {operator.name: last for last, island in islands.items() for operator in island}
    for node in order:
        if node.name in islands:
            wanted = {name for operator in islands[node.name] for name in operator.inputs}
            own = {operator.name for operator in islands[node.name]}
            assert wanted - own <= done
            done |= own
        elif node.name not in inside:
            assert set(node.inputs) <= done
            done.add(node.name)


def test_an_island_is_compiled_once(tmp_path: Path) -> None:
    """Equal operators share their code, whatever their constants."""
    maker = Maker(8, 5)
    value = "x"
    for _ in range(3):
        real = maker.dequantize(maker.conv(value, out=16, padding=1), 0.02)
        norm = {"w": maker.floats(16), "b": maker.floats(16)}
        out = maker.operator("group_norm.default", [real], "%0", 4, "@w", "@b", 1e-5, constants=norm)
        value = maker.quantize(out, 40.0, 128)
    graph = maker.graph()
    plan = make_plan(graph, BuildOptions(TARGET))
    islands = [call for call in plan.calls if isinstance(call.spec, IslandSpec)]
    assert len(islands) == 3
    assert len({call.key for call in islands}) == 1
    objects = KernelObjects(tmp_path)
    artifact = Artifact(graph, plan, compile_plan(plan, graph.input_shape, objects))
    assert objects.compiled == len({call.key for call in plan.calls})
    assert not any(verify(artifact, images(graph)).values())
    assert max(float_errors(artifact, images(graph)).values()) < TOLERANCE


def test_what_tvm_cannot_import_is_refused_by_name() -> None:
    maker = Maker(4, 4)
    real = maker.dequantize("x")
    fine = maker.operator("softmax.int", [real], "%0", 1)
    odd = maker.operator("erfinv.default", [fine], "%0")
    maker.quantize(odd)
    graph = maker.graph()
    assert can_compile(graph[fine])  # type: ignore[arg-type]
    assert not can_compile(graph[odd])  # type: ignore[arg-type]
    plan = make_plan(graph, BuildOptions(TARGET))
    with pytest.raises(BuildError, match=rf"{odd}.*aten::erfinv.default of \(1, 4, 4, 4\)"):
        compile_plan(plan, graph.input_shape)


def test_an_artifact_of_another_torch_is_not_believed(tmp_path: Path) -> None:
    graph = attention()
    folder = compiled(graph, TARGET).save(tmp_path / "artifact")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["plan"] == make_plan(graph, BuildOptions(TARGET)).digest
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest | {"plan": "0" * 64})))
    with pytest.raises(BuildError, match="build its graph again"):
        Artifact.load(folder)
