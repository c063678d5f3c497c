"""Networks whose input is a vector: all that networks of images can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expressions import chain
from small_graphs import INT8, UINT8, Maker, assert_exact, compiled, images

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.measurement.profile import KernelProfile


def perceptron(features: int = 37) -> IntegerGraph:
    """Three layers with a skip connection, a concatenation and a batch norm."""
    maker = Maker(features, None, seed=features)
    first = maker.linear("x", 48, UINT8)
    second = maker.prelu(maker.affine(maker.linear(first, 48, UINT8)))
    maker.linear(maker.concat(maker.add(first, second), maker.table("x")), 10)
    return maker.graph()


@pytest.mark.parametrize("features", [1, 4, 16, 37, 300])
@pytest.mark.parametrize("path", ["native", "portable"])
def test_a_perceptron(features: int, path: str) -> None:
    graph = perceptron(features)
    assert graph.input_shape == (features,)
    artifact = compiled(graph, get_target(path))
    for count in (0, 1, 5):
        x = images(graph, count)
        assert torch.equal(artifact.run(x), graph.run(x))
    assert_exact(artifact, images(graph, 3))


def test_any_reader_of_a_vector() -> None:
    maker = Maker(24, None)
    image = maker.flatten("x")
    maker.conv(image, out=5, kernel=1)
    maker.conv(image, out=24, padding=1, groups=24)
    maker.conv(maker.move("x", torch.arange(24).reshape(2, 3, 4)), out=5, padding=1)
    maker.gather("x", [3, -1, 5])
    maker.requantize("x", INT8)
    maker.clip("x", (3, 90))
    maker.float_linear("input", 5)
    maker.float_conv(maker.flatten("input"), 5, 3, padding=1)
    maker.float_conv(maker.move("input", torch.arange(24).reshape(2, 3, 4)), 5, 3, padding=1)
    graph = maker.graph()
    assert_exact(compiled(graph, get_target()), images(graph, 2))


def test_few_features_are_stored_without_spare_ones() -> None:
    maker = Maker(3, None)
    maker.conv(maker.flatten("x"), out=5, padding=1)
    assert_exact(compiled(maker.graph(), get_target()), images(maker.graph(), 2))


def test_normalisation_inside_the_network_is_exact() -> None:
    """Bytes that are normalised before they are quantized: the last bit decides where a value is between two steps."""
    for shape in ((16,), (3, 16, 16)):
        maker = Maker(shape[0], shape[1:] or None)  # type: ignore[arg-type]
        bytes_ = maker.float_node(ir.FloatFunction, "input", steps=chain(("div", 255.0)))
        gain, shift = torch.rand(shape[0]) * 4 + 1, torch.randn(shape[0])
        normal = maker.float_node(ir.FloatAffine, bytes_, gain=gain, shift=shift)
        quantized = maker.quantize(maker.gather(normal, list(range(shape[0]))[::-1]), 127.5 / 4, 128)
        maker.linear(maker.flatten(quantized) if len(shape) == 3 else quantized, 10)
        graph = maker.graph()
        assert graph.is_integer_only
        x = torch.randint(0, 256, (20, *shape)).float()
        artifact = compiled(graph, get_target())
        for name, value in graph.run_all(x).items():
            if name in (bytes_, normal):
                assert torch.equal(artifact.run_all(x)[name], value)
        assert_exact(artifact, x)


def test_saving_loading_measuring(tmp_path: Path) -> None:
    graph = perceptron()
    artifact = baqe.build(graph, schedules="default")
    folder = artifact.save(tmp_path / "artifact")
    x = images(graph, 3)
    loaded = Artifact.load(folder)
    assert torch.equal(loaded.run(x), graph.run(x))
    assert torch.equal(torch.from_numpy(loaded.run_array(x[:1].numpy())), graph.run(x[:1]))
    assert not any(baqe.verify(loaded, x).values())
    assert baqe.measure(loaded, repeats=3, warmup=1).latency_us > 0
    with pytest.raises(ConfigError, match=r"shape \(1, 3\).*\(n, 37\)"):
        loaded.run(torch.zeros(1, 3))
    profile = KernelProfile(make_plan(graph, BuildOptions(get_target())), graph.input_shape)
    assert torch.equal(torch.from_numpy(profile.run(x[:1].numpy())), graph.run(x[:1]))
