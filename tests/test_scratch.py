"""What killed processes leave is removed by the next, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lightning_baqe.resources import want_room
from lightning_baqe.scratch import (
    compiling_folder,
    remove_leftovers,
    scratch_folder,
    scratch_path,
    temporary_folder,
)

_DIES = """
import os, sys
from pathlib import Path
from lightning_baqe.scratch import scratch_folder, scratch_path
here = Path(sys.argv[1])
scratch_path(here / "summary.json").write_text("half")
folder = scratch_path(here / "trial_3")
folder.mkdir()
(folder / "module.so").write_text("half")
owner = object.__new__(type("Owner", (), {}))
print(scratch_folder(owner))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_of_a_dead_process(tmp_path: Path, own_temporary: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = subprocess.run([sys.executable, "-c", _DIES, run_dir], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert len(list(run_dir.iterdir())) == 2
    assert list(own_temporary.iterdir()) == [Path(done.stdout.strip())]
    (run_dir / "summary.json").touch()
    remove_leftovers([run_dir, tmp_path / "nowhere"])
    assert [path.name for path in run_dir.iterdir()] == ["summary.json"]
    assert list(own_temporary.iterdir()) == []


def test_of_living_processes_and_others_stay(tmp_path: Path, own_temporary: Path) -> None:
    kept = [scratch_path(tmp_path / "summary.json"), tmp_path / ".notes.tmp", tmp_path / ".a.12345678-1.tmp"]
    for path in kept:
        path.touch()
    with temporary_folder() as folder:
        remove_leftovers([tmp_path])
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    assert all(path.exists() for path in kept)
    foreign = kept[-1]
    os.utime(foreign, (time.time() - 30 * 24 * 3600,) * 2)
    remove_leftovers([tmp_path])
    assert [path.exists() for path in kept] == [True, True, False]


def test_a_folder_ends_with_its_owner(own_temporary: Path) -> None:
    class Owner:
        pass

    owner = Owner()
    folder = scratch_folder(owner)
    (folder / "file").touch()
    del owner
    assert not folder.exists()


def test_compilers_write_to_memory_where_there_is_some(monkeypatch: pytest.MonkeyPatch, own_temporary: Path) -> None:
    with compiling_folder() as folder:
        assert Path(folder).parent in (Path("/dev/shm"), own_temporary)
    monkeypatch.setattr("lightning_baqe.scratch._MEMORY", str(own_temporary / "none"))
    with compiling_folder() as folder:
        assert Path(folder).parent == own_temporary


def test_a_full_disk_is_told_before_a_compiler_meets_it(own_temporary: Path) -> None:
    with pytest.raises(OSError, match=f"No space left on device.*{1 << 60} wanted"):
        want_room(str(own_temporary), 1 << 60)
