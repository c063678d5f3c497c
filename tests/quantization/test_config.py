from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_baqe import BitConfig, LayerBits
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import layers
from quantization.small_networks import Residual

LAYER_BITS = st.one_of(st.builds(LayerBits, st.integers(2, 8), st.integers(2, 8)), st.just(LayerBits(32, 32)))


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), LAYER_BITS, min_size=1, max_size=6),
    st.integers(2, 8),
    st.one_of(st.none(), st.text(max_size=4)),
)
def test_json_round_trip(bits: dict[str, LayerBits], other: int, signature: str | None) -> None:
    config = BitConfig(bits, (), other, signature)
    again = BitConfig.from_json(config.to_json())
    assert again == config
    assert list(again) == list(config)
    assert again.signature == signature
    assert hash(again) == hash(config)


def test_uniform_exempts_first_and_last() -> None:
    config = BitConfig.uniform(Residual(), 4, 3)
    assert list(config) == list(layers(Residual()))
    assert config["stem"] == config["fc"] == LayerBits(8, 8)
    assert config["block1.conv1"] == LayerBits(4, 3)
    assert set(BitConfig.uniform(Residual(), 4, 4, first_last=None).values()) == {LayerBits(4, 4)}
    assert set(BitConfig.uniform(Residual(), 32, 32).values()) == {LayerBits(32, 32)}


def test_file_pickle_and_copy(tmp_path) -> None:
    config = BitConfig.uniform(Residual(), 4, 4, ties=(("block1.conv1", "block1.conv2"),))
    path = tmp_path / "bits.json"
    path.write_text(config.to_json())
    assert BitConfig.from_json(path) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_replace() -> None:
    config = BitConfig.uniform(Residual())
    changed = config.replace({"block1.conv1": LayerBits(4, 4)}, stem=LayerBits(8, 7))
    assert changed["block1.conv1"] == LayerBits(4, 4)
    assert changed["stem"] == LayerBits(8, 7)
    assert config["stem"] == LayerBits(8, 8)
    assert list(changed) == list(config)
    with pytest.raises(ConfigError, match=r"did you mean 'stem'"):
        config.replace(stam=LayerBits(4, 4))


@pytest.mark.parametrize("pair", [(1, 8), (9, 8), (8, 0), (32, 8), (8, 32), (True, 8), (4.0, 4), ("4", 4), ((), 4)])
def test_bits_out_of_range(pair) -> None:
    with pytest.raises(ConfigError):
        LayerBits(*pair)


def test_ties_must_agree_and_exist() -> None:
    with pytest.raises(ConfigError, match="tied layers"):
        BitConfig({"a": LayerBits(8, 8), "b": LayerBits(4, 4)}, ties=(("a", "b"),))
    with pytest.raises(ConfigError, match="ties names layer 'c'"):
        BitConfig({"a": LayerBits(8, 8)}, ties=(("a", "c"),))


def test_check_names_what_is_wrong() -> None:
    model = Residual()
    config = BitConfig.uniform(model)
    with pytest.raises(ConfigError, match=r"'block1.conv9'.*did you mean 'block1.conv"):
        BitConfig({**config, "block1.conv9": LayerBits(8, 8)}).check(model)
    with pytest.raises(ConfigError, match="no bits for layer 'fc'"):
        BitConfig({name: bits for name, bits in config.items() if name != "fc"}).check(model)
    with pytest.raises(ConfigError, match="stale signature"):
        config.check(Residual(channels=4))
    with pytest.raises(ConfigError, match="nothing to quantize"):
        BitConfig.uniform(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        json.dumps({"version": 99, "layers": {"a": [8, 8]}}),
        json.dumps({"version": 1, "layers": {"a": [8]}}),
        json.dumps({"version": 1, "layers": {}}),
        json.dumps({"version": 1, "layers": {"a": [8, "8"]}}),
        json.dumps({"version": 1, "layers": {"a": [8, 8]}, "ties": 5}),
        json.dumps({"version": 1, "layers": {"a": [8, 8]}, "ties": ["ab"]}),
        json.dumps({"version": 1, "layers": {"a": [8, 8]}, "ties": None}),
        json.dumps({"version": 1, "layers": {"a": [8, 8]}, "signature": []}),
        "[" * 100_000,
    ],
)
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError):
        BitConfig.from_json(text)


CONFIG = BitConfig({"stem": LayerBits(8, 8), "été": LayerBits(4, 4)})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text(CONFIG.to_json(), encoding=encoding)
    assert BitConfig.from_json(path) == CONFIG


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read .*No such file"),
        (b"{", "not a bit-config"),
        (CONFIG.to_json().encode("utf-16"), "not whole JSON in UTF-8"),
        (b'{"version": 1, "layers": {"stem": [9, 8]}}', "layer 'stem': weight bits must be .*got 9"),
        (b'{"version": 1, "layers": {"stem": 8}}', "layer 'stem' must be"),
    ],
)
def test_a_bad_file_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path}.*{said}"):
        BitConfig.from_json(path)


def test_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} is no file but a folder.*given as a Path"):
        BitConfig.from_json(tmp_path)
    with pytest.raises(ConfigError, match="got a dict; a bit-config is given as its JSON text, or its file's Path"):
        BitConfig.from_json({"version": 1})  # type: ignore[arg-type]
