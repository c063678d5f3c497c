"""Progressive fine-tuning: networks of more bits first, each from the weights of the one before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from smallest import SMALLEST

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d
from lightning_baqe.quantization.weight import initial_weight_scale
from lightning_baqe.train import main

OURS = ["recipe=qat", "data=digits", *SMALLEST, "qat.calibration_batches=1", "qat.epochs=1", "bits.weight=2"]


def test_fewer_bits_go_on_from_the_weights_of_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "cache"))
    taken: list[tuple[set[int], set[int]]] = []
    take = QuantizedModel.take_weights

    def watched(self: QuantizedModel, trained: QuantizedModel) -> None:
        take(self, trained)
        taken.append({int(layer.weight) for layer in m.bits.values()} for m in (trained, self))  # type: ignore[arg-type]
        weights = [{n: p for n, p in m.state_dict().items() if n.endswith(".weight")} for m in (trained, self)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        for layer in (layer for layer in self.modules() if isinstance(layer, QuantConv2d)):
            torch.testing.assert_close(layer.weight_quantizer.scale.detach(), initial_weight_scale(
                layer.weight, layer.weight_quantizer.bits))  # fmt: skip
        folded = copy.deepcopy(trained)
        del folded.get_submodule("stem").__dict__["_modules"]["1"]
        with pytest.raises(ConfigError, match=r"take_weights wants the same network at other bits, but 'stem.1"):
            take(self, folded)

    monkeypatch.setattr(QuantizedModel, "take_weights", watched)
    ours = [*OURS, "qat.progressive=[4,3]", f"run_dir={tmp_path}/run"]
    assert main(ours) == 0
    assert [tuple(pair) for pair in taken] == [({8, 4}, {8, 3}), ({8, 3}, {8, 2})]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["float.ckpt", "qat.ckpt", "qat_3_bit.ckpt", "qat_4_bit.ckpt"]
    (tmp_path / "run" / "checkpoints" / "qat.ckpt").unlink()
    assert main(ours) == 0  # the others are not trained again
    assert len(taken) == 4
    refused = (
        (["qat.progressive=[3,4]"], "qat.progressive=[3, 4], wanted are bits of 8 down to 3"),
        (["qat.progressive=[2]"], "wanted are bits of 8 down to 3"),
        (["qat.progressive=[4]", "qat.epochs=0"], "qat.epochs=0 trains nothing"),
    )
    for number, (options, wanted) in enumerate(refused):
        assert main([*OURS, *options, f"run_dir={tmp_path}/refused{number}"]) == 1
        assert wanted in capsys.readouterr().err
