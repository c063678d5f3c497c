from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_baqe.benchmarks.onnx_agreement import EnlargedGlyphs, compare, main


def test_it_runs_and_trains_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--networks", "resnet18", "--smallest", "--images", "4", "--folder", str(tmp_path / "own")]
    arguments += ["--checkpoints", str(tmp_path / "none"), "--json", str(tmp_path / "rows.json")]
    status = main(arguments)
    rows = json.loads((tmp_path / "rows.json").read_text())
    exact = next(row for row in rows if row["engine"] == "ONNX Runtime, exact")
    assert status == int(bool(exact["failures"]))
    assert exact["cosine_mean"] > 0.99
    assert "ONNX Runtime" in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "own").glob("*.ckpt")
    assert (tmp_path / "own" / "resnet18.onnx").exists()
    written = checkpoint.stat().st_mtime_ns
    main(arguments)
    assert checkpoint.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_limits() -> None:
    own = np.random.default_rng(0).standard_normal((200, 10)).astype(np.float32)
    labels = own.argmax(1)
    assert compare("n", "e", own, own * np.float32(1.001), labels).failures == []
    other = own.copy()
    other[:3] *= -1
    row = compare("n", "e", own, other, labels)
    assert row.accuracy == pytest.approx(0.985)
    assert [text.split(",")[0] for text in row.failures] == [
        "same class on 98.50%", "mean cosine 0.97000", "smallest cosine -1.00000",
    ]  # fmt: skip


def test_images_are_enlarged(tmp_path: Path) -> None:
    data = EnlargedGlyphs(48, train_size=62, val_size=62, test_size=62, cache_dir=tmp_path)
    image, label = data.dataset("val")[0]
    assert image.shape == (3, 48, 48) == tuple(data.example_input.shape[1:])
    plain = EnlargedGlyphs(32, train_size=62, val_size=62, test_size=62, cache_dir=tmp_path)
    before, same = plain.dataset("val")[0]
    assert label == same
    assert abs(float(image.mean() - before.mean())) < 0.05
