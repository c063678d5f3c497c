"""The house itself: which way imports point, what a wheel holds, what the repository must not hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_baqe

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# A module may import from its own part and from every part of an earlier row.
ORDER = (
    ("errors", "files"),
    ("quantization", "search", "data"),
    ("integer", "allocation", "latency", "supernet"),
    ("deploy", "records"),
    ("runs",),
    ("tasks",),
    ("callbacks",),
    ("train", "flows", "benchmarks", "recipes"),
)
RANK = {part: row for row, parts in enumerate(ORDER) for part in parts}
BESIDE = {
    ("flows", "train"),
    ("records", "deploy"),
}  # in one row, and one idea in two places
THIRD_PARTIES = {"search": {"pytorch_lightning", "tvm"}, "quantization": {"pytorch_lightning", "tvm"}}


def modules() -> Iterator[tuple[str, Path]]:
    """(part, path) of every module; the root package itself is left out."""
    for folder, prefix in (
        (ROOT / "lightning_baqe", ()),
        (ROOT / "callbacks", ("callbacks",)),
        (ROOT / "recipes", ("recipes",)),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if parts != ("__init__",):
                yield parts[0], path


def imports(path: Path) -> Iterator[str]:
    """Absolute names of every module that `path` imports, also inside functions; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "lightning_baqe" else (module,)


@pytest.mark.parametrize(("part", "path"), list(modules()), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_one_way(part: str, path: Path) -> None:
    assert part in RANK, f"{path} belongs to no part of the order: add it"
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("callbacks", "recipes"), f"{path} imports {name}; its name is lightning_baqe.{name}"
        assert top not in THIRD_PARTIES.get(part, set()), f"{path} imports {name}"
        other = rest.partition(".")[0]
        if top == "lightning_baqe" and other in RANK and other != part and (part, other) not in BESIDE:
            assert RANK[other] < RANK[part], f"{path}: {part} must not import {other}"


def tracked_files() -> list[Path]:
    """Files of the repository, those not yet committed included; every file where there is no repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository around the tests: this is an unpacked source archive")
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_registry_addresses() -> None:
    registry = re.compile(rb"https?://[\w.-]*(?:pypi\.org|pythonhosted\.org|registry\.npmjs\.org)/\S", re.IGNORECASE)
    setting = re.compile(rb"(?:--)?(?:extra-)?index-url\s*=")
    found = [
        path for path in tracked_files() if registry.search(path.read_bytes()) or setting.search(path.read_bytes())
    ]
    assert [path for path in found if path != Path(__file__)] == []


def test_versions_agree() -> None:
    assert lightning_baqe.__version__ == PYPROJECT["project"]["version"]


def test_every_package_is_listed() -> None:
    packages = {
        "lightning_baqe" if path.parent == ROOT / "lightning_baqe" else f"lightning_baqe.{path.parent.name}"
        for path in [
            *(ROOT / "lightning_baqe").rglob("__init__.py"),
            ROOT / "callbacks/__init__.py",
            ROOT / "recipes/__init__.py",
        ]
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


def test_pins_hold_what_is_installed_by_name_and_version() -> None:
    pins = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+]+(?: ; .+)?", pin) for pin in pins)
    pinned = {pin.partition("==")[0] for pin in pins}
    groups = [*PYPROJECT["dependency-groups"].values(), *PYPROJECT["project"]["optional-dependencies"].values()]
    for group in [PYPROJECT["project"]["dependencies"], *groups]:
        for requirement in group:
            name = re.match(r"[\w.-]+", requirement)
            assert name
            assert name.group().lower() in pinned, f"{requirement} has no pin: run .ci/pin"


def test_wheel_holds_recipes_and_callbacks(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed: it builds the wheel")
    source = tmp_path / "source"
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [uv, "build", "--wheel", "--out-dir", str(tmp_path / "dist"), str(source), "--python", sys.executable]
    built = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("callbacks", "recipes"):
        wanted = {
            f"lightning_baqe/{folder}/{path.relative_to(ROOT / folder)}"
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".yaml")
        }
        assert wanted <= names
    assert "lightning_baqe/py.typed" in names
    landscapes = (ROOT / "lightning_baqe/landscapes/data").glob("*.json.gz")
    assert {f"lightning_baqe/landscapes/data/{path.name}" for path in landscapes} <= names
    assert not [name for name in names if name.startswith(("tests", "callbacks", "recipes", "train"))]


@pytest.mark.parametrize(
    "name",
    ["lightning_baqe", "lightning_baqe.search", "lightning_baqe.tasks", "lightning_baqe.train", "lightning_baqe.flows"],
)
def test_importing_does_not_load_tvm(name: str) -> None:
    code = f"import {name}, sys; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import lightning_baqe, sys; sys.exit(bool({'torch', 'tvm', 'pytorch_lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0
