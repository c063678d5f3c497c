"""What generates code is found in whatever folder: a module that is missed would leave stale artifacts believed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_baqe.deploy.digest import (
    NO_GENERATORS,
    PACKAGE,
    generator_sources,
    imported_modules,
    imports_of,
    module_path,
)

# Every function of this package that runs while a network of all kinds of operators is planned and compiled.
TRACED = """
import json, sys
import torch, torchvision
import lightning_baqe as baqe
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1)
        self.d, self.c = torch.nn.Conv2d(16, 16, 3, groups=16), torch.nn.Conv2d(16, 4, 1)
        self.fc = torch.nn.Linear(8, 3)
    def forward(self, x):
        x = self.a(x)
        x = torch.nn.functional.silu(x + self.b(x))
        x = torch.nn.functional.max_pool2d(self.d(x), 2)
        x = self.c(x * x.mean((2, 3), keepdim=True))
        return self.fc(torch.cat([x, x.flip(1)], 1).mean((2, 3)))

x = torch.randn(4, 3, 8, 8)
net = Net().eval()
graphs = []
for width in (4, 8, 32):
    model = baqe.calibrate(baqe.quantize(net, baqe.BitConfig.uniform(net, width, width), x), [x])
    graphs.append(baqe.lower(model.eval(), x[:1]))
ran = set()
def look(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>":
        ran.add(frame.f_code.co_filename)
sys.setprofile(look)
for name in ("amx", "avx2", "portable"):
    for graph in graphs:
        compile_plan(make_plan(graph, BuildOptions(get_target(name))), graph.input_shape)
sys.setprofile(None)
print(json.dumps(sorted(ran)))
"""


def test_all_that_runs_while_code_is_generated_is_covered(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTNING_BAQE_CACHE": str(tmp_path)}  # where no kernel is compiled yet
    done = subprocess.run(
        [sys.executable, "-c", TRACED], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr
    ran = {Path(name) for name in json.loads(done.stdout.splitlines()[-1]) if Path(name).is_relative_to(PACKAGE)}
    generating = {path for path in ran if path.relative_to(PACKAGE).with_suffix("").parts[0] not in NO_GENERATORS}
    assert len(generating) > 10
    assert not generating - set(generator_sources())


def test_every_template_is_covered() -> None:
    assert {path for path in (PACKAGE / "kernels/x86").glob("*.py") if path.stem != "__init__"} <= set(
        generator_sources()
    )


def test_what_measures_does_not_count() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in generator_sources()}
    assert not {"measurement", "tuning", "costs", "runs"} & rooms


def test_imports_are_those_that_python_sees() -> None:
    for path in PACKAGE.rglob("*.py"):
        seen = [
            (node.module, [alias.name for alias in node.names])
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_baqe.")
        ]
        assert sorted(imports_of(path.read_text())) == sorted(seen), path


def test_a_module_that_is_not_there_is_no_silent_gap() -> None:
    assert imported_modules("lightning_baqe.kernels.x86", ["conv"]) == ["lightning_baqe.kernels.x86.conv"]
    with pytest.raises(RuntimeError, match="does not exist"):
        module_path("lightning_baqe.kernels.x86.conv_template")
