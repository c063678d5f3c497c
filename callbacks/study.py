"""The study of one search: the only truth about what was tried, with the run folder written from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.trial import TrialState

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.device import device_info, versions
from lightning_baqe.deploy.evaluate import Batches, deployed_accuracy
from lightning_baqe.deploy.front import pareto_entries
from lightning_baqe.deploy.run_folder import (
    BASELINES,
    FLOAT,
    REFERENCE_POINT,
    RESULT,
    REWARDS,
    TEST,
    objectives,
    summarise,
    write_summary,
)
from lightning_baqe.deploy.space import NetworkSpace
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.report import write_report
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.sampler import BaqeSampler

OWNER, SPACE, CONDITIONS, PHASE, ATTEMPTS = "owner", "space", "conditions", "phase", "attempts"
KNOWLEDGE = "knowledge"
MAX_ATTEMPTS = 3  # of a point whose trials end with the process: perhaps because of it
INTERRUPTED = "interrupted: the process ended in the middle of this trial"


def bits_entry(bits: BitConfig) -> dict[str, list[Any]]:
    """Bits as the summary holds them: ``{layer: [weight, activation]}``."""
    return {name: [layer.weight, layer.activation] for name, layer in bits.items()}


class SearchStudy:
    """An Optuna study with three minimised objectives: error, latency and size relative to the float model.

    Args:
        run_dir: the run folder.
        storage: an Optuna storage URL; None: ``study.db`` in the run folder.
        about: recipe, model and dataset, for the summary.
        threads: of the measurements.
    """

    reference_point: ClassVar[tuple[float, float, float]] = REFERENCE_POINT

    def __init__(
        self,
        run_dir: Path,
        storage: str | None,
        about: Mapping[str, Any],
        threads: int = 1,
    ) -> None:
        self.run_dir = run_dir
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name="search" if storage is None else run_dir.resolve().name,
            storage=storage or f"sqlite:///{(run_dir / 'study.db').resolve()}",
            directions=["minimize"] * 3,
            load_if_exists=True,
        )
        self._shared, self._owner = storage is not None, str(run_dir.resolve())
        self._about = {**about, "device": device_info(threads), "versions": versions()}

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
        """Begin, or go on: trials that a killed process left running are closed and queued again."""
        self._study.sampler = self._sampler = sampler
        self._study.set_user_attr(SPACE, space.record())
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._shared and trial.user_attrs.get(OWNER) not in (None, self._owner):
                continue  # another worker's
            known = trial.user_attrs.get(RESULT, {})
            self._study._storage.set_trial_user_attr(trial._trial_id, RESULT, {**known, "error": INTERRUPTED})
            self._study.tell(trial.number, state=TrialState.FAIL)
            attempts = trial.user_attrs.get(ATTEMPTS, 1)
            if space.distributions.keys() <= trial.params.keys() and attempts < MAX_ATTEMPTS:
                again = {PHASE: known.get("phase", "bo"), ATTEMPTS: attempts + 1}
                self._study.enqueue_trial(trial.params, user_attrs=again)

    @property
    def knowledge(self) -> Knowledge | None:
        """What the search knew when it began, None before :meth:`set_knowledge`."""
        known = self._study.user_attrs.get(KNOWLEDGE)
        return None if known is None else Knowledge.from_record(known)

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Keep what the search knows: a search that goes on believes what it began with."""
        self._study.set_user_attr(KNOWLEDGE, knowledge.record())

    @property
    def float_result(self) -> dict[str, Any] | None:
        """The float model's figures, None before it was evaluated."""
        found: dict[str, Any] | None = self._study.user_attrs.get(FLOAT)
        return found

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
    def done_count(self) -> int:
        """Complete trials and evaluated baselines."""
        return self.complete_count + len(self.baseline_names)

    @property
    def last_error(self) -> str:
        """Why the last failed trial failed."""
        failed = self._count(TrialState.FAIL)
        return str(failed[-1].user_attrs.get(RESULT, {}).get("error")) if failed else "none"

    def set_float(self, result: dict[str, Any]) -> None:
        """Keep the float model's figures."""
        self._study.set_user_attr(FLOAT, result)

    def set_rewards(self, rewards: Mapping[str, Any]) -> None:
        """Keep what each bit-width buys on the device, a :meth:`~lightning_baqe.deploy.rewards.Rewards.summary`."""
        self._study.set_user_attr(REWARDS, dict(rewards))

    def add_baseline(self, entry: dict[str, Any]) -> None:
        """Keep a baseline's entry."""
        self._study.set_user_attr(BASELINES, [*self._study.user_attrs.get(BASELINES, []), entry])

    def ask(self, space: NetworkSpace) -> tuple[optuna.Trial, str]:
        """The next trial, its parameters suggested, and the phase that proposed it."""
        trial = self._study.ask(space.distributions)
        trial.set_user_attr(OWNER, self._owner)
        phase = trial.user_attrs.get(PHASE)  # of an interrupted trial that is tried again
        if phase is None:
            if isinstance(self._sampler, BaqeSampler):
                phase = self._sampler.phase(self._study, trial)
            else:
                phase = type(self._sampler).__name__
        bits, schedules = space.point(trial.params)
        trial.set_user_attr(RESULT, {"phase": phase, "bits": bits_entry(bits), "schedules": schedules})
        return trial, phase

    def tell(self, trial: optuna.Trial, entry: dict[str, Any]) -> None:
        """Keep a trial's entry; without an error its objectives count."""
        reference = self.float_result
        assert reference is not None
        values = objectives(entry, reference) if entry["error"] is None else None
        if values is not None and not all(math.isfinite(value) for value in values):
            entry["error"], values = f"objectives are not finite: {values}", None
        trial.set_user_attr(RESULT, entry)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, list(values))

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        return summarise(self._study, self._about)

    def write(self, report: bool = False) -> None:
        """Write ``summary.json`` and ``pareto.csv``, and with ``report`` also ``report.html``."""
        if self.float_result is None:
            return
        summary = self.summary()
        write_summary(self.run_dir, summary)
        if report:
            write_report(summary, self.run_dir / "report.html")

    def test_front(self, batches: Batches | None) -> None:
        """Accuracy on the test split of the float model and of every Pareto point that lacks it, compiled."""
        if batches is None or self.float_result is None:
            return
        tests: dict[str, float] = dict(self._study.user_attrs.get(TEST, {}))
        for name in ["float", *(name for name, _ in pareto_entries(self.summary()))]:
            if name not in tests:
                tests[name] = deployed_accuracy(Artifact.load(self.run_dir / "artifacts" / name), batches)
                self._study.set_user_attr(TEST, tests)
