"""A study whose database is damaged is refused by name, and goes on from its backup and the summary."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from lightning_baqe.benchmarks import workers
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.recovery import BACKUP, BACKUP_TRIALS, DATABASE, damage, restore
from lightning_baqe.runs.study import FLOAT_FIGURES, SearchStudy, read_study
from lightning_baqe.runs.summary import Baseline, Summary, Trial

SPACE = workers.made_up_space()
ABOUT = {"recipe": "search", "model": "none", "dataset": "none"}


def opened(folder: Path, recover: bool = False) -> SearchStudy:
    if recover:
        restore(folder, read_study)
    study = SearchStudy(folder, None, ABOUT)
    study.open(SPACE, optuna.samplers.RandomSampler(seed=0), recover)
    if study.float_result is None:
        study.keep(FLOAT_FIGURES, workers.FLOAT.record())
    return study


def searched(folder: Path, trials: int) -> Summary:
    """So many complete trials and a baseline."""
    with closing(opened(folder)) as study:
        study.add_baseline(Baseline(name="w8a8", **vars(workers.FLOAT)))
        for _ in range(trials):
            asked = study.ask()
            assert asked is not None
            trial, phase = asked
            point = SPACE.point(trial.params)
            figures = workers.made_up_figures(*point)
            bits = {name: (layer.weight, layer.activation) for name, layer in point[0].items()}
            study.tell(
                trial, Trial(number=trial.number, phase=phase, **{**figures, "bits": bits, "schedules": point[1]})
            )
            study.write()
        return study.summary()


def figures_of(summary: Summary) -> list[tuple[int, object]]:
    return [(trial.number, trial.triple) for trial in summary.trials if trial.state == "complete"]


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)


def test_a_damaged_study_says_how_to_go_on(tmp_path: Path) -> None:
    searched(tmp_path, 2)
    spoil(tmp_path / DATABASE)
    with pytest.raises(ConfigError, match=r"(?s)damaged.*search\.recover=true"):
        opened(tmp_path)


def test_values_that_were_not_written_by_a_search(tmp_path: Path) -> None:
    searched(tmp_path, 2)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection, connection:
        connection.execute("UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'result'")
    assert damage(tmp_path / DATABASE, read_study) is not None
    with pytest.raises(ConfigError, match=r"search\.recover=true"):
        opened(tmp_path)


@pytest.mark.parametrize("backup", [True, False])
def test_recovered(backup: bool, tmp_path: Path) -> None:
    before = searched(tmp_path, BACKUP_TRIALS + 3)
    assert len(figures_of(before)) == BACKUP_TRIALS + 3
    spoil(tmp_path / DATABASE)
    if not backup:
        (tmp_path / BACKUP).unlink()
    with closing(opened(tmp_path, recover=True)) as study:
        after = study.summary()
        assert figures_of(after) == figures_of(before)
        assert [entry.triple for entry in after.baselines] == [entry.triple for entry in before.baselines]
        assert after.hypervolume == pytest.approx(before.hypervolume)
        asked = study.ask()
        assert asked is not None
        assert asked[0].number >= len(before.trials)
    assert (tmp_path / f"{DATABASE}.damaged-1").is_file()


def test_a_whole_study_stays(tmp_path: Path) -> None:
    before = searched(tmp_path, 3)
    content = (tmp_path / DATABASE).read_bytes()
    restore(tmp_path, read_study)
    assert (tmp_path / DATABASE).read_bytes() == content
    with closing(opened(tmp_path, recover=True)) as study:
        assert figures_of(study.summary()) == figures_of(before)


def test_nothing_to_begin_from(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="neither a usable"):
        restore(tmp_path, read_study)
    assert (tmp_path / DATABASE).read_bytes() == b"nothing"
