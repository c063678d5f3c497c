"""The study of one search: the only truth about what was tried, with the run folder written from it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.measurement.device import Device
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.runs.evaluation import deployed_accuracy
from lightning_baqe.runs.limits import violations
from lightning_baqe.runs.liveness import Worker
from lightning_baqe.runs.objectives import objectives, summarise
from lightning_baqe.runs.recovery import (
    ADVICE,
    BACKUP_TRIALS,
    UNREADABLE,
    add_trials,
    back_up,
    is_out_of_reach,
    summary_of,
)
from lightning_baqe.runs.report import write_report
from lightning_baqe.runs.study_storage import open_storage, shown, storage_url
from lightning_baqe.runs.summary import Baseline, Entry, Figures, Summary, Trial, Width
from lightning_baqe.scratch import remove_leftovers_of_run
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.patience import Patience, watch
from lightning_baqe.search.sampler import BaqeSampler
from lightning_baqe.search.study_lock import study_lock
from lightning_baqe.search.study_sampler import PHASE_KEY, proposed_point
from lightning_baqe.tasks.scoring import Batches, Scorer
from lightning_baqe.tuning.network_space import NetworkSpace, SpaceRecord

# What is kept of the study, and of each trial.
FLOAT_FIGURES, BASELINES, TEST, REWARDS, LIMITS = "float", "baselines", "test_accuracy", "rewards", "limits"
SPACE, CONDITIONS, KNOWLEDGE, CLAIMS = "space", "conditions", "knowledge", "baseline_owners"
RESULT, OWNER, PHASE, ATTEMPTS, AGAIN = "result", "owner", "phase", "attempts", "again"
REPEATS = 20  # proposals of another sampler that repeat a point, before one is taken all the same
MAX_ATTEMPTS = 3  # of a point whose trials end with the process: perhaps because of it
_SCHEMAS: tuple[tuple[TypeAdapter[Any], str], ...] = (
    (TypeAdapter(Figures), FLOAT_FIGURES),
    (TypeAdapter(list[Baseline]), BASELINES),
    (TypeAdapter(dict[str, float]), LIMITS),
    (TypeAdapter(dict[str, float]), TEST),
    (TypeAdapter(dict[str, str]), CLAIMS),
    (TypeAdapter(dict[str, Any]), CONDITIONS),
    (TypeAdapter(dict[str, Any]), REWARDS),
)
_Found = TypeVar("_Found")
INTERRUPTED = "interrupted: the process ended in the middle of this trial"
_STATES: dict[TrialState, Literal["complete", "running", "failed", "pruned"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
}


def bits_entry(bits: BitConfig) -> dict[str, tuple[Width, int]]:
    """Bits as the summary holds them: ``{layer: (weight, activation)}``."""
    return {name: (layer.weight, layer.activation) for name, layer in bits.items()}


class SearchStudy:
    """An Optuna study with three minimised objectives: error, latency and size relative to the float model.

    Several processes may work on one study: those that are given the same run folder, or the same storage and name.
    Every step that reads and then writes is done :meth:`alone`. What a worker had begun when it died is begun again by
    the next one that asks for work. A database that does not answer is waited for; every method raises StorageError
    where that takes too long.

    Args:
        run_dir: the run folder.
        storage: URL of an SQLite file or a PostgreSQL database; None: ``study.db`` in the run folder.
        about: recipe, metric, model, dataset and device, for the summary; the device is this machine if it says none.
        name: of the study in the storage; None: the run folder's.

    Raises:
        ConfigError: another kind of storage, one that cannot be opened, or its driver is not installed.
    """

    def __init__(self, run_dir: Path, storage: str | None, about: Mapping[str, Any], name: str | None = None) -> None:
        self.run_dir = run_dir
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        remove_leftovers_of_run(run_dir)
        name = name or ("search" if storage is None else run_dir.resolve().name)
        url = storage_url(run_dir, storage)
        self._lock, self._patience = study_lock(url, name), Patience(f"the study's database {shown(url)}")
        self._storage = open_storage(url, self._patience)
        watch(self._storage.engine, self._lock.check)
        self._own_file = storage is None
        self._backed_up = -1  # trials at the last backup
        self._begun: set[int | str] = set()  # numbers of trials and names of baselines that this worker is at
        advice = ADVICE if self._own_file else "restore the database from a backup of your own"

        def create() -> optuna.Study:
            with refusing_damage(advice):
                if self._own_file and (others := set(optuna.get_all_study_names(self._storage)) - {name}):
                    raise ValueError(f"studies named {sorted(others)}")
                study = optuna.create_study(
                    study_name=name, storage=self._storage, directions=["minimize"] * 3, load_if_exists=True
                )
                read_study(study)
                return study

        with ExitStack() as undo:
            undo.callback(self._storage.engine.dispose)
            self._study = self.alone(create)
            self._study_id = self._patience.repeat(lambda: self._storage.get_study_id_from_name(name))
            self._worker = self._patience.repeat(lambda: Worker(self._study))
            undo.pop_all()
        self._about = {"device": device_info(), **about, "versions": versions()}

    def alone(self, step: Callable[[], _Found]) -> _Found:
        """What a step gives that no other worker's step may come between.

        Args:
            step: reads the study, then writes it. It is begun anew as a whole where the database goes away meanwhile,
                so it looks first at what is there.
        """

        def locked() -> _Found:
            with self._lock:
                return step()

        return self._patience.repeat(locked)

    def kept(self, what: str) -> Any:
        """What :meth:`keep` was given under this name by any worker; None: nothing."""
        return self._patience.repeat(lambda: self._study.user_attrs).get(what)

    def keep(self, what: str, value: Any) -> None:
        """Keep something in the study; JSON can hold it."""
        self._patience.repeat(lambda: self._study.set_user_attr(what, value))

    def known_space(self, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of the space that the study was begun with, None for a new study.

        Args:
            conditions: what must be as it was then: bits to choose from, device, and so on; JSON can hold it.

        Raises:
            ConfigError: a condition differs.
        """
        known: dict[str, Any] | None = self.kept(SPACE)
        if known is None:
            self.keep(CONDITIONS, dict(conditions))
            return None
        before, now = self.kept(CONDITIONS), json.loads(json.dumps(dict(conditions)))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"the study in {self.run_dir} was begun with {name} = {before.get(name)!r}, now it is "
                    f"{now.get(name)!r}: its trials could not be compared; use another run_dir, or what it was begun "
                    "with"
                )
        return known

    def open(self, space: NetworkSpace, sampler: optuna.samplers.BaseSampler, recover: bool = False) -> None:
        """Begin, or go on; baselines that failed are forgotten, so that they are tried again.

        Args:
            space, sampler: of the search.
            recover: take from the run folder's summary what the study lacks.
        """
        self._space = space
        self._study.sampler = self._sampler = sampler

        def begin() -> None:
            if self.kept(SPACE) is None:
                self.keep(SPACE, space.record())
            if recover:
                self._recover()
            self._reclaim()
            self.keep(BASELINES, [entry for entry in self.kept(BASELINES) or [] if entry["state"] == "complete"])

        self.alone(begin)

    def _recover(self) -> None:
        summary = summary_of(self.run_dir)
        if summary is None or summary.reference is None:
            return
        if self.kept(FLOAT_FIGURES) is None:
            self.keep(FLOAT_FIGURES, summary.reference.record())
        if not self.kept(BASELINES):
            self.keep(BASELINES, [entry.record() for entry in summary.baselines])
        added, foreign = add_trials(self._study, self._space, summary, RESULT)
        if foreign:
            warnings.warn(
                f"trials {foreign} of {self.run_dir / 'summary.json'} are not in the space that is searched now and "
                f"were left out; {added} were taken over",
                UserWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Leave the study: this process is no worker of it any more."""
        try:
            self._patience.repeat(self._worker.close)
        finally:
            self._storage.engine.dispose()

    def _id(self, trial: optuna.Trial | FrozenTrial) -> int:
        """Of a trial in the storage."""
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _in_state(self, *states: TrialState) -> list[FrozenTrial]:
        return self._patience.repeat(lambda: self._study.get_trials(deepcopy=False, states=states or None))

    def _reclaim(self) -> None:
        """Close the trials that nobody is at any more, and queue their points again; none is begun meanwhile."""
        trials = self._in_state()
        dead = {t.number for t in trials if t.state == TrialState.RUNNING and not self._is_tended(t)}
        if not dead:
            return
        queued = {trial.user_attrs.get(AGAIN) for trial in trials}
        states = (TrialState.RUNNING, TrialState.WAITING, TrialState.COMPLETE)
        taken = [self._point(trial) for trial in trials if trial.state in states and trial.number not in dead]
        for trial in (trial for trial in trials if trial.number in dead):
            known, point = trial.user_attrs.get(RESULT, {}), self._point(trial)
            attempts = trial.user_attrs.get(ATTEMPTS, 1)
            # Queued before it is closed: whoever dies in between leaves it to be closed, not queued twice.
            if attempts < MAX_ATTEMPTS and trial.number not in queued and point is not None and point not in taken:
                phase = known.get("phase") or trial.user_attrs.get(PHASE) or trial.system_attrs.get(PHASE_KEY, "bo")
                begun = bool(known)  # otherwise the worker died while it asked for the trial
                again = {PHASE: phase, ATTEMPTS: attempts + begun, AGAIN: trial.number}
                self._study.enqueue_trial(point, user_attrs=again)
                taken.append(point)
            self._storage.set_trial_user_attr(self._id(trial), RESULT, {**known, "error": INTERRUPTED})
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _is_tended(self, trial: FrozenTrial) -> bool:
        """Whether a living worker is at a trial; this one is not at what it asked for when the database went away."""
        owner = trial.user_attrs.get(OWNER)
        return trial.number in self._begun if owner == self._worker.id else self._worker.alive(owner)

    def _point(self, trial: FrozenTrial) -> dict[str, Any] | None:
        """The whole point of a trial, also of one that ended before all of it was suggested; None: it had none yet."""
        found = proposed_point(trial, self._space.distributions) | trial.params
        return found if self._space.distributions.keys() <= found.keys() else None

    @property
    def float_result(self) -> Figures | None:
        """The float model's figures, None before they are kept as ``FLOAT_FIGURES``."""
        found = self.kept(FLOAT_FIGURES)
        return None if found is None else Figures.model_validate(found)

    @property
    def baselines(self) -> list[Baseline]:
        """Those that were evaluated."""
        return [Baseline(**entry) for entry in self.kept(BASELINES) or []]

    def trials(self) -> list[Trial]:
        """The trials that were begun, by their numbers."""
        return [
            _trial_of(trial)
            for trial in self._in_state(*_STATES)
            # Without a result: a proposal that repeated another and was never begun.
            if trial.state != TrialState.PRUNED or RESULT in trial.user_attrs
        ]

    @property
    def complete_count(self) -> int:
        """Trials with figures."""
        return len(self._in_state(TrialState.COMPLETE))

    def set_limits(self, limits: Mapping[str, float]) -> None:
        """Keep the limits: complete trials beyond them are infeasible to the sampler, and marked in the summary.

        Raises:
            ConfigError: trials were completed under other limits.
        """
        before = self.kept(LIMITS) or {}
        if before != dict(limits) and self.complete_count:
            raise ConfigError(
                f"the study in {self.run_dir} has trials that were constrained by limits = {before}, now they are "
                f"{dict(limits)}: use another run_dir, or the limits that it was begun with"
            )
        self.keep(LIMITS, dict(limits))

    def claim_baseline(self, names: Sequence[str]) -> str | None:
        """The first of the baselines that nobody has evaluated or evaluates; from now on this worker does."""

        def claim() -> str | None:
            done, owners = {entry.name for entry in self.baselines}, self.kept(CLAIMS) or {}
            for name in names:
                mine = owners.get(name) == self._worker.id
                if name not in done and not (name in self._begun if mine else self._worker.alive(owners.get(name))):
                    self.keep(CLAIMS, {**owners, name: self._worker.id})
                    return name
            return None

        name = self.alone(claim)
        if name is not None:
            self._begun.add(name)
        return name

    def add_baseline(self, entry: Baseline) -> None:
        """Keep a baseline's entry; the first of a name counts."""

        def add() -> None:
            known = self.kept(BASELINES) or []
            if all(one["name"] != entry.name for one in known):
                self.keep(BASELINES, [*known, entry.record()])

        self.alone(add)
        self._begun.discard(entry.name)

    def ask(self, wanted: int | None = None) -> tuple[optuna.Trial, str] | None:
        """The next trial, its parameters suggested, and the phase that proposed it.

        Args:
            wanted: complete trials to reach; None: no bound.

        Returns:
            None where the trials that run now, if all become complete, reach ``wanted``: ask again when one has ended.
        """

        def begin() -> tuple[optuna.Trial, str] | None:
            self._reclaim()
            if wanted is not None and len(self._in_state(TrialState.COMPLETE, TrialState.RUNNING)) >= wanted:
                return None
            trial = self._new_trial()
            phase = trial.user_attrs.get(PHASE)  # of an interrupted trial that is tried again
            if phase is None:
                if isinstance(self._sampler, BaqeSampler):
                    phase = self._sampler.phase(self._study, trial)
                else:
                    phase = type(self._sampler).__name__
            bits, schedules = self._space.point(trial.params)
            trial.set_user_attr(RESULT, {"phase": phase, "bits": bits_entry(bits), "schedules": schedules})
            return trial, phase

        asked = self.alone(begin)
        if asked is not None:
            self._begun.add(asked[0].number)
        return asked

    def _new_trial(self) -> optuna.Trial:
        """A trial of this worker; its point is new, unless an interrupted one is tried again."""
        repeats = 0
        while True:
            trial = self._study.ask(self._space.distributions)
            trial.set_user_attr(OWNER, self._worker.id)
            # The first proposes nothing twice by itself.
            if isinstance(self._sampler, BaqeSampler) or PHASE in trial.user_attrs or repeats == REPEATS:
                return trial
            if all(other.params != trial.params for other in self._in_state() if other.number != trial.number):
                return trial
            self._study.tell(trial, state=TrialState.PRUNED)
            repeats += 1

    def give_back(self, trial: optuna.Trial) -> None:
        """Let somebody else evaluate a trial that was asked for and never begun."""

        def wait() -> None:
            found = self._storage.get_trial(self._id(trial))
            if found.state == TrialState.RUNNING and found.user_attrs.get(OWNER) == self._worker.id:
                self._storage.set_trial_state_values(self._id(trial), TrialState.WAITING)

        self.alone(wait)
        self._begun.discard(trial.number)

    def tell(self, trial: optuna.Trial, entry: Entry) -> None:
        """Keep a trial's entry; its objectives count unless it is pruned or has an error.

        Warns:
            UserWarning: another worker took this one for dead meanwhile and tries the point again.
        """
        reference = self.float_result
        assert reference is not None
        ended = entry.state != "pruned" and entry.error is None
        values = objectives(entry, reference) if ended else None
        if values is not None and not all(math.isfinite(value) for value in values):
            entry, values = entry.model_copy(update={"error": f"objectives are not finite: {values}"}), None

        def finish() -> None:
            found = self._storage.get_trial(self._id(trial))
            if found.state.is_finished():  # by this worker, if the database went away before it said so
                if found.user_attrs.get(RESULT, {}).get("error") == INTERRUPTED:
                    warnings.warn(
                        f"trial {trial.number} was given to another worker, since this one gave no sign of life for "
                        "minutes; its figures are dropped",
                        UserWarning,
                        stacklevel=6,
                    )
                return
            trial.set_user_attr(RESULT, entry.record())
            if values is None:
                self._study.tell(trial, state=TrialState.PRUNED if entry.state == "pruned" else TrialState.FAIL)
            else:
                for name, value in violations(entry, self.kept(LIMITS) or {}).items():
                    trial.set_constraint(name, value)
                self._study.tell(trial, list(values))

        self.alone(finish)
        self._begun.discard(trial.number)

    def summary(self) -> Summary:
        """What ``summary.json`` holds."""
        reference = self.float_result
        assert reference is not None
        more = {"limits": self.kept(LIMITS), "rewards": self.kept(REWARDS), "tests": self.kept(TEST)}
        return summarise(self._about, reference, self.trials(), self.baselines, **more)

    def write(self, report: bool = False) -> Summary:
        """Write ``summary.json`` and ``pareto.csv``, and with ``report`` also ``report.html``."""

        def files() -> Summary:  # alone: an older summary must not replace a newer one
            summary = self.summary()
            summary.write(self.run_dir)
            if self._own_file and not 0 <= len(summary.trials) - self._backed_up < BACKUP_TRIALS:
                back_up(self.run_dir)
                self._backed_up = len(summary.trials)
            return summary

        summary = self.alone(files)
        if report:
            write_report(summary, self.run_dir / "report.html")
        return summary

    def test_front(self, batches: Batches, device: Device, scorer: Scorer | None = None) -> None:
        """Accuracy on the test split of the float model and of every Pareto point that lacks it, on the device.

        Points whose artifacts are in another worker's run folder are left to it.
        """

        def test() -> None:  # alone: the second of two workers finds it done
            tests: dict[str, float] = dict(self.kept(TEST) or {})
            for name in ["float", *(entry.key for entry in self.summary().pareto)]:
                folder = self.run_dir / "artifacts" / name
                if name not in tests and folder.is_dir():
                    with closing(Artifact.load(folder)) as artifact:
                        tests[name] = deployed_accuracy(artifact, batches, device, scorer)
                    self.keep(TEST, tests)

        self.alone(test)


@contextmanager
def refusing_damage(advice: str) -> Iterator[None]:
    """Turn what damaged studies raise into a ConfigError that gives the advice."""
    try:
        yield
    except UNREADABLE as error:
        if is_out_of_reach(error):
            raise
        raise ConfigError(f"the study is damaged ({type(error).__name__}: {error}): {advice}") from error


def read_study(study: optuna.Study) -> None:
    """Read all of a study; raises whatever what is in it makes Optuna, SQLite and schemas raise."""
    kept = study.user_attrs
    for trial in study.get_trials(deepcopy=False):
        _trial_of(trial)
    for schema, what in _SCHEMAS:
        if kept.get(what) is not None:
            schema.validate_python(kept[what])
    if kept.get(SPACE) is not None:
        SpaceRecord.model_validate(kept[SPACE])
    if kept.get(KNOWLEDGE) is not None:
        Knowledge.from_record(kept[KNOWLEDGE])


def _trial_of(trial: FrozenTrial) -> Trial:
    """A trial's entry."""
    return Trial(
        **{**trial.user_attrs.get(RESULT, {}), "number": trial.number, "state": _STATES.get(trial.state, "running")}
    )
