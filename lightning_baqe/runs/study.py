"""The study of one search: the only truth about what was tried, with the run folder written from it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.measurement.device import Device
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.runs.evaluation import Batches, deployed_accuracy
from lightning_baqe.runs.limits import violations
from lightning_baqe.runs.liveness import Worker
from lightning_baqe.runs.objectives import REFERENCE_POINT, objectives, summarise
from lightning_baqe.runs.report import write_report
from lightning_baqe.runs.summary import Baseline, Entry, Figures, Summary, Trial, Width
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.sampler import BaqeSampler
from lightning_baqe.search.study_lock import study_lock
from lightning_baqe.tuning.network_space import NetworkSpace

RESULT, FLOAT, BASELINES, TEST, REWARDS = "result", "float", "baselines", "test_accuracy", "rewards"
LIMITS = "limits"
OWNER, SPACE, CONDITIONS, PHASE, ATTEMPTS = "owner", "space", "conditions", "phase", "attempts"
KNOWLEDGE = "knowledge"
AGAIN, CLAIMS = "again", "baseline_owners"
REPEATS = 20  # proposals of another sampler that repeat a point, before one is taken all the same
MAX_ATTEMPTS = 3  # of a point whose trials end with the process: perhaps because of it
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
    Every step that reads and then writes holds ``lock``. What a worker had begun when it died is begun again by the
    next one that asks for work.

    Args:
        run_dir: the run folder.
        storage: URL of an SQLite file or a PostgreSQL database; None: ``study.db`` in the run folder.
        about: recipe, model, dataset and device, for the summary; the device is this machine if it says none.
        name: of the study in the storage; None: the run folder's.

    Raises:
        ConfigError: another kind of storage, or its driver is not installed.
    """

    reference_point: ClassVar[tuple[float, float, float]] = REFERENCE_POINT

    def __init__(
        self,
        run_dir: Path,
        storage: str | None,
        about: Mapping[str, Any],
        name: str | None = None,
    ) -> None:
        self.run_dir = run_dir
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name = name or ("search" if storage is None else run_dir.resolve().name)
        url = storage or f"sqlite:///{(run_dir / 'study.db').resolve()}"
        self.lock = study_lock(url, name)
        # Two processes that create the tables at once would collide, also those of two studies in one database.
        with study_lock(url, "tables"), self.lock:
            self._storage = _open_storage(url)
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, directions=["minimize"] * 3, load_if_exists=True
            )
        self._worker = Worker(self._study)
        self._about = {"device": device_info(), **about, "versions": versions()}

    def known_space(self, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of the space that the study was begun with, None for a new study.

        Args:
            conditions: what must be as it was then: bits to choose from, device, and so on; JSON can hold it.

        Raises:
            ConfigError: a condition differs.
        """
        known = self._study.user_attrs.get(SPACE)
        if known is None:
            self._study.set_user_attr(CONDITIONS, dict(conditions))
            return None
        before, now = self._study.user_attrs[CONDITIONS], json.loads(json.dumps(dict(conditions)))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"the study in {self.run_dir} was begun with {name} = {before.get(name)!r}, now it is "
                    f"{now.get(name)!r}: its trials could not be compared; use another run_dir, or what it was begun "
                    "with"
                )
        record: dict[str, Any] = known
        return record

    def open(self, space: NetworkSpace, sampler: optuna.samplers.BaseSampler) -> None:
        """Begin, or go on."""
        self._study.sampler = self._sampler = sampler
        with self.lock:
            if SPACE not in self._study.user_attrs:
                self._study.set_user_attr(SPACE, space.record())
            self._reclaim(space)

    def close(self) -> None:
        """Leave the study: this process is no worker of it any more."""
        self._worker.close()
        self._storage.engine.dispose()

    def _reclaim(self, space: NetworkSpace) -> None:
        """Close the trials whose workers died and queue their points again. The lock is held, so none begins now."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        dead = [trial for trial in running if not self._worker.alive(trial.user_attrs.get(OWNER))]
        queued = {t.user_attrs.get(AGAIN) for t in self._study.get_trials(deepcopy=False)} if dead else set()
        for trial in dead:
            known = trial.user_attrs.get(RESULT, {})
            attempts = trial.user_attrs.get(ATTEMPTS, 1)
            whole = space.distributions.keys() <= trial.params.keys()
            # Queued before it is closed: whoever dies in between leaves it to be closed, not queued twice.
            if whole and attempts < MAX_ATTEMPTS and trial.number not in queued:
                again = {PHASE: known.get("phase", "bo"), ATTEMPTS: attempts + 1, AGAIN: trial.number}
                self._study.enqueue_trial(trial.params, user_attrs=again)
            self._study._storage.set_trial_user_attr(trial._trial_id, RESULT, {**known, "error": INTERRUPTED})
            self._study.tell(trial.number, state=TrialState.FAIL)

    @property
    def knowledge(self) -> Knowledge | None:
        """What the search knew when it began, None before :meth:`set_knowledge`."""
        known = self._study.user_attrs.get(KNOWLEDGE)
        return None if known is None else Knowledge.from_record(known)

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Keep what the search knows: a search that goes on believes what it began with."""
        self._study.set_user_attr(KNOWLEDGE, knowledge.record())

    @property
    def float_result(self) -> Figures | None:
        """The float model's figures, None before it was evaluated."""
        found = self._study.user_attrs.get(FLOAT)
        return None if found is None else Figures.model_validate(found)

    def drop_failed_baselines(self) -> None:
        """Forget baselines that failed, so that they are tried again."""
        kept = [entry for entry in self._study.user_attrs.get(BASELINES, []) if entry["state"] == "complete"]
        self._study.set_user_attr(BASELINES, kept)

    @property
    def baseline_names(self) -> list[str]:
        """Of the baselines that were evaluated."""
        return [entry["name"] for entry in self._study.user_attrs.get(BASELINES, [])]

    def _count(self, state: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))

    @property
    def complete_count(self) -> int:
        """Trials with figures."""
        return len(self._count(TrialState.COMPLETE))

    @property
    def failed_count(self) -> int:
        """Trials that failed by themselves; interrupted ones are not counted."""
        return sum(t.user_attrs.get(RESULT, {}).get("error") != INTERRUPTED for t in self._count(TrialState.FAIL))

    @property
    def pruned_count(self) -> int:
        """Trials that were given up for what they promised."""
        return sum(RESULT in trial.user_attrs for trial in self._count(TrialState.PRUNED))

    @property
    def done_count(self) -> int:
        """Complete trials and evaluated baselines."""
        return self.complete_count + len(self.baseline_names)

    @property
    def last_error(self) -> str:
        """Why the last failed trial failed."""
        failed = self._count(TrialState.FAIL)
        return str(failed[-1].user_attrs.get(RESULT, {}).get("error")) if failed else "none"

    def set_float(self, result: Figures) -> None:
        """Keep the float model's figures."""
        self._study.set_user_attr(FLOAT, result.model_dump(mode="json"))

    def set_rewards(self, rewards: Mapping[str, Any]) -> None:
        """Keep what each bit-width buys on the device, a :meth:`~lightning_baqe.costs.bit_rewards.Rewards.summary`."""
        self._study.set_user_attr(REWARDS, dict(rewards))

    def set_limits(self, limits: Mapping[str, float]) -> None:
        """Keep the limits: complete trials beyond them are infeasible to the sampler, and marked in the summary.

        Raises:
            ConfigError: trials were completed under other limits.
        """
        before = self._study.user_attrs.get(LIMITS, {})
        if before != dict(limits) and self.complete_count:
            raise ConfigError(
                f"the study in {self.run_dir} has trials that were constrained by limits = {before}, now they are "
                f"{dict(limits)}: use another run_dir, or the limits that it was begun with"
            )
        self._study.set_user_attr(LIMITS, dict(limits))

    def claim_baseline(self, names: Sequence[str]) -> str | None:
        """The first of the baselines that nobody has evaluated or evaluates; from now on this worker does."""
        with self.lock:
            done, owners = self.baseline_names, self._study.user_attrs.get(CLAIMS, {})
            for name in names:
                if name not in done and not self._worker.alive(owners.get(name)):
                    self._study.set_user_attr(CLAIMS, {**owners, name: self._worker.id})
                    return name
        return None

    def add_baseline(self, entry: Baseline) -> None:
        """Keep a baseline's entry."""
        with self.lock:
            self._study.set_user_attr(BASELINES, [*self._study.user_attrs.get(BASELINES, []), entry.record()])

    def ask(self, space: NetworkSpace, wanted: int | None = None) -> tuple[optuna.Trial, str] | None:
        """The next trial, its parameters suggested, and the phase that proposed it.

        Args:
            space: what the sampler proposes from.
            wanted: complete trials to reach; None: no bound.

        Returns:
            None where the trials that run now, if all become complete, reach ``wanted``: ask again when one has ended.
        """
        with self.lock:
            self._reclaim(space)
            if wanted is not None and self.complete_count + len(self._count(TrialState.RUNNING)) >= wanted:
                return None
            trial = self._new_trial(space)
            phase = trial.user_attrs.get(PHASE)  # of an interrupted trial that is tried again
            if phase is None:
                if isinstance(self._sampler, BaqeSampler):
                    phase = self._sampler.phase(self._study, trial)
                else:
                    phase = type(self._sampler).__name__
            bits, schedules = space.point(trial.params)
            trial.set_user_attr(RESULT, {"phase": phase, "bits": bits_entry(bits), "schedules": schedules})
        return trial, phase

    def _new_trial(self, space: NetworkSpace) -> optuna.Trial:
        """A trial of this worker; its point is new, unless an interrupted one is tried again."""
        for _ in range(REPEATS):
            trial = self._study.ask(space.distributions)
            trial.set_user_attr(OWNER, self._worker.id)
            if isinstance(self._sampler, BaqeSampler) or PHASE in trial.user_attrs:
                break  # it proposes nothing twice by itself
            others = self._study.get_trials(deepcopy=False)
            if all(other.params != trial.params for other in others if other.number != trial.number):
                break
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            trial = self._study.ask(space.distributions)
            trial.set_user_attr(OWNER, self._worker.id)
        return trial

    def give_back(self, trial: optuna.Trial) -> None:
        """Let somebody else evaluate a trial that was asked for and never begun."""
        self._study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def tell(self, trial: optuna.Trial, entry: Entry) -> None:
        """Keep a trial's entry; without an error its objectives count.

        Warns:
            UserWarning: another worker took this one for dead meanwhile and tries the point again.
        """
        reference = self.float_result
        assert reference is not None
        values = objectives(entry, reference) if entry.error is None else None
        if values is not None and not all(math.isfinite(value) for value in values):
            entry, values = entry.model_copy(update={"error": f"objectives are not finite: {values}"}), None
        with self.lock:
            if self._study._storage.get_trial(trial._trial_id).state.is_finished():
                warnings.warn(
                    f"trial {trial.number} was given to another worker, since this one gave no sign of life for "
                    "minutes; its figures are dropped",
                    UserWarning,
                    stacklevel=2,
                )
                return
            trial.set_user_attr(RESULT, entry.record())
            if values is None:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                for name, value in violations(entry, self._study.user_attrs.get(LIMITS, {})).items():
                    trial.set_constraint(name, value)
                self._study.tell(trial, list(values))

    def prune(self, trial: optuna.Trial, entry: Entry) -> None:
        """Give a trial up, and keep its entry."""
        with self.lock:
            if not self._study._storage.get_trial(trial._trial_id).state.is_finished():
                trial.set_user_attr(RESULT, entry.record())
                self._study.tell(trial, state=TrialState.PRUNED)

    def summary(self) -> Summary:
        """What ``summary.json`` holds."""
        attributes, reference = self._study.user_attrs, self.float_result
        assert reference is not None
        trials = [
            Trial(**{**trial.user_attrs.get(RESULT, {}), "number": trial.number, "state": _STATES[trial.state]})
            for trial in self._study.get_trials(deepcopy=False, states=tuple(_STATES))
            # Without a result: a proposal that repeated another and was never begun.
            if trial.state != TrialState.PRUNED or RESULT in trial.user_attrs
        ]
        baselines = [Baseline(**entry) for entry in attributes.get(BASELINES, [])]
        more = {name: attributes.get(key) for name, key in (("limits", LIMITS), ("rewards", REWARDS), ("tests", TEST))}
        return summarise(self._about, reference, trials, baselines, **more)

    def write(self, report: bool = False) -> None:
        """Write ``summary.json`` and ``pareto.csv``, and with ``report`` also ``report.html``."""
        if self.float_result is None:
            return
        with self.lock:  # an older summary must not replace a newer one
            summary = self.summary()
            summary.write(self.run_dir)
        if report:
            write_report(summary, self.run_dir / "report.html")

    def test_front(self, batches: Batches | None, device: Device) -> None:
        """Accuracy on the test split of the float model and of every Pareto point that lacks it, on the device.

        Points whose artifacts are in another worker's run folder are left to it.
        """
        if batches is None or self.float_result is None:
            return
        with self.lock:  # the second of two workers finds it done
            tests: dict[str, float] = dict(self._study.user_attrs.get(TEST, {}))
            for name in ["float", *(entry.key for entry in self.summary().pareto)]:
                folder = self.run_dir / "artifacts" / name
                if name not in tests and folder.is_dir():
                    tests[name] = deployed_accuracy(Artifact.load(folder), batches, device)
                    self._study.set_user_attr(TEST, tests)


def _open_storage(url: str) -> RDBStorage:
    """Optuna's storage, with patience for several workers."""
    if url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    if url.startswith("postgresql"):
        # A trial may last longer than a server keeps an idle connection.
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    raise ConfigError(
        f"storage={url!r}, but a search locks its study, and that is for an SQLite file (sqlite:///study.db, one "
        "machine) or PostgreSQL (postgresql://user@host/database): give one of these"
    )
