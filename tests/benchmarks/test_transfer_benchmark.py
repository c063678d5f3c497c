"""``benchmarks.machines.transfer`` on a few made-up networks and machines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lightning_baqe.benchmarks.machines import transfer
from lightning_baqe.benchmarks.machines.transfer import KNOWN, OPERATORS, UNSEEN
from lightning_baqe.errors import DataError


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    drawn = [rng.choice(OPERATORS, 6) for _ in range(80)]
    texts = [f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|" for a, b, c, d, e, f in drawn]
    by_operator = dict(zip(OPERATORS, (0.0, 0.1, 1.0, 4.0, 0.5), strict=True))
    latencies = {
        name: [5 + sum(by_operator[of] * (1 + 0.1 * n) for of in operators) for operators in drawn]
        for n, name in enumerate((*KNOWN, *UNSEEN))
    }
    path = tmp_path / "latency.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"architectures": texts, "latency_ms": latencies}).encode()))
    assert transfer.main(["--latencies", str(path), "--known", "60", "--samples", "5", "--draws", "2"]) == 0
    assert "eyeriss" in capsys.readouterr().out
    del latencies["eyeriss"]
    path.write_bytes(gzip.compress(json.dumps({"architectures": texts, "latency_ms": latencies}).encode()))
    with pytest.raises(DataError, match="no latencies of 'eyeriss'"):
        transfer.read_latencies(path)
    with pytest.raises(DataError, match="is no network of NAS-Bench-201"):
        transfer.parts_of("|conv~0|")
