"""The house itself: which way imports point, what a wheel holds, what the repository must not hold."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_baqe

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# In the order in which data passes them: a module may import from its own room and from every room above it.
ORDER = (
    "errors", "lazy", "interrupts", "resources", "scratch", "files", "data", "quantization", "calibration", "integer",
    "onnx", "allocation", "search", "hardware", "kernels", "entrance", "learned_bits", "tasks", "deploy",
    "measurement", "tuning",
    "costs", "supernet", "runs", "landscapes", "engines", "callbacks", "records", "fine_tuning", "bit_learning",
    "train", "flows", "benchmarks", "recipes",
)  # fmt: skip
OPTIONAL = {"onnx"}  # rooms of optional dependencies: a function of an earlier room may import them when it needs them
THIRD_PARTIES = {"search": {"pytorch_lightning", "tvm"}, "quantization": {"pytorch_lightning", "tvm"}}
MOST_MODULES = {"benchmarks": 29}
FEWEST = 20  # modules that any other folder may hold


def find_modules() -> dict[str, Path]:
    """Every module by its name without the package's; the root package itself is left out."""
    found = {}
    for folder, prefix in (
        (ROOT / "lightning_baqe", ()),
        (ROOT / "callbacks", ("callbacks",)),
        (ROOT / "recipes", ("recipes",)),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts).removesuffix(".__init__")
            if name != "__init__":
                found[name] = path
    return found


MODULES = find_modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of every module that `path` imports, whether inside a function; not for type checkers alone."""
    tree = ast.parse(path.read_text())
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            block.body = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                is_module = whole.removeprefix("lightning_baqe.") in MODULES and whole.startswith("lightning_baqe.")
                yield (whole if is_module else module), id(node) in inside


def own_imports(name: str) -> Iterator[str]:
    """The modules of this package that a module imports; rooms of optional dependencies apart, inside functions."""
    for imported, inside in imports(MODULES[name]):
        own = imported.removeprefix("lightning_baqe.")
        if imported.startswith("lightning_baqe.") and not (inside and own.partition(".")[0] in OPTIONAL):
            yield own


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_point_one_way(name: str) -> None:
    room = name.partition(".")[0]
    assert room in ORDER, f"{name} is in no room of the order: add it"
    for imported, _ in imports(MODULES[name]):
        top = imported.partition(".")[0]
        assert top not in ("callbacks", "recipes"), f"{name} imports {imported}; its name is lightning_baqe.{imported}"
        assert top not in THIRD_PARTIES.get(room, set()), f"{name} imports {imported}"
    for own in own_imports(name):
        assert own in MODULES, f"{name} imports {own}, which is no module"
        other = own.partition(".")[0]
        assert ORDER.index(other) <= ORDER.index(room), f"{name} must not import {own}: {other} comes after {room}"


def test_no_circles() -> None:
    graph = {name: {own for own in own_imports(name) if own != name} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_folders_are_small_and_names_stand_once() -> None:
    files = [path for path in MODULES.values() if path.stem != "__init__"]
    for folder in {path.parent for path in files}:
        inside = [path for path in files if path.parent == folder]
        assert len(inside) <= MOST_MODULES.get(folder.name, FEWEST), f"{folder} holds {len(inside)} modules"
    twice = [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]
    assert not twice, f"file names that stand more than once: {twice}"


@pytest.mark.parametrize("name", list(MODULES))
def test_public_functions_have_docstrings(name: str) -> None:
    def public(body: list[ast.stmt], where: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{where}{node.name}"

    missing = list(public(ast.parse(MODULES[name].read_text()).body, ""))
    assert not missing, f"{name}: no docstring in {missing}"


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
    folders = [path.parent for path in (ROOT / "lightning_baqe").rglob("__init__.py")]
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages |= {"lightning_baqe.callbacks", "lightning_baqe.recipes"}
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
    assert {"lightning_baqe/py.typed", "lightning_baqe/benchmarks/families.json"} <= names
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


@pytest.mark.parametrize("name", ["Distillation", "FreezeBatchNorm", "ParetoCheckpoint"])
def test_a_callback_loads_only_what_it_needs(name: str) -> None:
    heavy = "{'tvm', 'botorch', 'gpytorch', 'timm', 'optuna'} & set(sys.modules)"
    code = f"from lightning_baqe.callbacks import {name}; import sys; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
