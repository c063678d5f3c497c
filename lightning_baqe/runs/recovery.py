"""A study that outlives its database: backups while a search runs, and a study anew from them and the summary.

Of a search in the run folder's own ``study.db`` there is ``study.backup.db``, made by SQLite's own means, which is at
most :data:`BACKUP_TRIALS` trials old. What it lacks stands in ``summary.json``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_baqe.errors import BaqeError, ConfigError, DataError, StorageError
from lightning_baqe.runs.objectives import objectives
from lightning_baqe.runs.summary import Entry, Figures, Summary, Trial
from lightning_baqe.scratch import scratch_path
from lightning_baqe.tuning.network_space import NetworkSpace

DATABASE, BACKUP = "study.db", "study.backup.db"
BACKUP_TRIALS = 5
ADVICE = (
    "start the same command with search.recover=true: it begins the study anew from study.backup.db, summary.json and "
    "the artifacts, and keeps the damaged file beside it"
)
_OUT_OF_REACH = (
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
)
# What Optuna, SQLAlchemy and we raise on rows that hold something else than was written.
UNREADABLE = (
    *(sqlite3.DatabaseError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, BaqeError),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError),
)


def back_up(run_dir: Path) -> None:
    """Copy the run folder's study; a run whose folder is full goes on without, and is told so."""
    scratch = scratch_path(run_dir / BACKUP)
    try:
        with closing(sqlite3.connect(run_dir / DATABASE)) as source, closing(sqlite3.connect(scratch)) as copy:
            source.backup(copy)
        os.replace(scratch, run_dir / BACKUP)
    except (OSError, sqlite3.DatabaseError) as error:
        scratch.unlink(missing_ok=True)
        warnings.warn(f"{run_dir / BACKUP} could not be written ({error})", UserWarning, stacklevel=2)


def damage(path: Path, check: Any) -> str | None:
    """Why a study's file cannot be used, None where it can.

    Args:
        path: of the file.
        check: reads a study of it, and raises where it cannot be right.
    """
    try:
        storage = RDBStorage(f"sqlite:///{path.resolve()}")
        try:
            for name in optuna.get_all_study_names(storage):
                check(optuna.load_study(study_name=name, storage=storage))
        finally:
            storage.engine.dispose()
    except UNREADABLE as error:
        if is_out_of_reach(error):
            raise  # a study that is in use, or on a full disk, is not damaged: it stays where it is
        return f"{type(error).__name__}: {error}"
    return None


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether a database is locked, full, unwritable or not answering, rather than damaged."""
    while error is not None:
        if isinstance(error, StorageError):
            return True
        if (
            isinstance(error, sqlite3.OperationalError)
            and getattr(error, "sqlite_errorcode", 0) & 0xFF in _OUT_OF_REACH
        ):
            return True
        if isinstance(error, sqlalchemy.exc.OperationalError) and not isinstance(error.orig, sqlite3.Error):
            return True  # a server's
        error = error.__cause__ or error.__context__
    return False


def restore(run_dir: Path, check: Any) -> None:
    """Put the backup, or nothing, in the place of a damaged ``study.db``; one that is whole stays.

    Raises:
        ConfigError: there is neither a backup nor a summary to begin from.
    """
    path, backup = run_dir / DATABASE, run_dir / BACKUP
    if path.is_file() and damage(path, check) is None:
        return
    usable = backup.is_file() and damage(backup, check) is None
    if not usable and not (run_dir / "summary.json").is_file():
        raise ConfigError(
            f"search.recover=true, but {run_dir} has neither a usable {BACKUP} nor a summary.json to begin from: start "
            "anew in another run_dir"
        )
    number = next(n for n in itertools.count(1) if not (run_dir / f"{DATABASE}.damaged-{n}").exists())
    for ending in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{ending}", f"{run_dir / DATABASE}.damaged-{number}{ending}")
    if usable:
        scratch = scratch_path(path)
        scratch.write_bytes(backup.read_bytes())
        os.replace(scratch, path)


def summary_of(run_dir: Path) -> Summary | None:
    """The summary to recover from; None, with a warning, where it cannot be read."""
    if not (run_dir / "summary.json").is_file():
        return None
    try:
        return Summary.load(run_dir)
    except (DataError, ConfigError) as error:
        warnings.warn(f"the study is recovered without the summary: {error}", UserWarning, stacklevel=2)
        return None


def add_trials(study: optuna.Study, space: NetworkSpace, summary: Summary, result: str) -> tuple[int, list[int]]:
    """Add the complete trials of a summary that the study lacks.

    Args:
        study: the study; numbers that the summary says nothing of become failed trials, so that numbers stay.
        space: of the points.
        result: the user attribute that holds a trial's entry.

    Returns:
        how many were added, and the numbers of those whose points the space does not have.
    """
    added, foreign = 0, []
    known = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    assert summary.reference is not None
    for entry in sorted(summary.trials, key=lambda one: one.number):
        if entry.state != "complete":
            continue
        while len(known) < entry.number:
            study.add_trial(create_trial(state=TrialState.FAIL))
            known[len(known)] = study.get_trials(deepcopy=False)[-1]
        there = known.get(entry.number)
        if there is not None and there.state.is_finished():
            continue
        params = _params(space, entry)
        if params is None:
            foreign.append(entry.number)
            continue
        made = _complete(space, params, entry, summary.reference, result)
        if there is None:
            study.add_trial(made)
            known[entry.number] = made
        elif not _finish(study, there, made, result):
            foreign.append(entry.number)
            continue
        added += 1
    return added, foreign


def _params(space: NetworkSpace, entry: Trial) -> dict[str, Any] | None:
    """The parameters of an entry's point; None where the space has no such point."""
    params: dict[str, Any] = {}
    for name, distribution in space.distributions.items():
        layer, _, what = name.rpartition("/")
        value = entry.bits.get(layer, (None, None))[1] if what == "bits" else entry.schedules.get(layer, {}).get(what)
        if value not in distribution.choices:  # type: ignore[attr-defined]
            return None
        params[name] = value
    return params


def _complete(
    space: NetworkSpace, params: Mapping[str, Any], entry: Entry, reference: Figures, result: str
) -> FrozenTrial:
    return create_trial(
        state=TrialState.COMPLETE,
        params=dict(params),
        distributions=dict(space.distributions),
        values=list(objectives(entry, reference)),
        user_attrs={result: entry.record()},
    )


def _finish(study: optuna.Study, there: FrozenTrial, made: FrozenTrial, result: str) -> bool:
    """Complete a trial that ran when the backup was made; False where it had no parameters yet, or others."""
    if there.params != made.params:
        return False
    study._storage.set_trial_user_attr(there._trial_id, result, made.user_attrs[result])
    study._storage.set_trial_state_values(there._trial_id, TrialState.COMPLETE, made.values)
    return True
