"""The study of one search: the only truth about what was tried, with the run folder written from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import optuna
import torch
from optuna.trial import TrialState

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.device import device_info, versions
from lightning_baqe.deploy.evaluate import deployed_accuracy
from lightning_baqe.deploy.front import pareto_entries
from lightning_baqe.deploy.run_folder import (
    BASELINES,
    FLOAT,
    REFERENCE_POINT,
    RESULT,
    TEST,
    objectives,
    summarise,
    write_summary,
)
from lightning_baqe.deploy.space import NetworkSpace
from lightning_baqe.errors import ConfigError
from lightning_baqe.report import write_report
from lightning_baqe.search.sampler import BaqeSampler

OWNER, SPACE, PHASE = "owner", "space", "phase"
INTERRUPTED = "interrupted: the process ended in the middle of this trial"


class SearchStudy:
    """An Optuna study with three minimised objectives: error, latency and size relative to the float model.

    Args:
        run_dir: the run folder.
        sampler: proposes points.
        storage: an Optuna storage URL; None: ``study.db`` in the run folder.
        about: recipe, model and dataset, for the summary.
        threads: of the measurements.
    """

    reference_point: ClassVar[tuple[float, float, float]] = REFERENCE_POINT

    def __init__(
        self,
        run_dir: Path,
        sampler: optuna.samplers.BaseSampler,
        storage: str | None,
        about: Mapping[str, Any],
        threads: int = 1,
    ) -> None:
        self.run_dir = run_dir
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name="search" if storage is None else run_dir.resolve().name,
            storage=storage or f"sqlite:///{(run_dir / 'study.db').resolve()}",
            sampler=sampler,
            directions=["minimize"] * 3,
            load_if_exists=True,
        )
        self._sampler = sampler
        self._about = {**about, "device": device_info(threads), "versions": versions()}

    def open(self, space: NetworkSpace, n_initial: int) -> None:
        """Go on with what the study holds: trials that a killed process left running are closed and queued again.

        Raises:
            ConfigError: the study was made for another search space.
        """
        signature = {name: list(getattr(d, "choices", ())) for name, d in space.distributions.items()}
        known = self._study.user_attrs.get(SPACE)
        if known is not None and known != json.loads(json.dumps(signature)):
            differing = sorted(k for k in {*known, *signature} if known.get(k) != signature.get(k))
            raise ConfigError(
                f"the study in {self.run_dir} searches another space; it differs in {differing[:5]}"
                f"{' and more' if len(differing) > 5 else ''}: use another run_dir, or the same model, bits and device"
            )
        self._study.set_user_attr(SPACE, signature)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get(OWNER, str(self.run_dir)) != str(self.run_dir):
                continue  # another worker's, on a shared storage
            known_entry = trial.user_attrs.get(RESULT, {})
            self._study._storage.set_trial_user_attr(trial._trial_id, RESULT, {**known_entry, "error": INTERRUPTED})
            self._study.tell(trial.number, state=TrialState.FAIL)
            if space.distributions.keys() <= trial.params.keys():
                self._study.enqueue_trial(trial.params, user_attrs={PHASE: known_entry.get("phase", "bo")})

    @property
    def float_result(self) -> dict[str, Any] | None:
        """The float model's figures, None before it was evaluated."""
        found: dict[str, Any] | None = self._study.user_attrs.get(FLOAT)
        return found

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

    def add_baseline(self, entry: dict[str, Any]) -> None:
        """Keep a baseline's entry."""
        self._study.set_user_attr(BASELINES, [*self._study.user_attrs.get(BASELINES, []), entry])

    def ask(self, space: NetworkSpace) -> tuple[optuna.Trial, str]:
        """The next trial, its parameters suggested, and the phase that proposed it."""
        trial = self._study.ask(space.distributions)
        trial.set_user_attr(OWNER, str(self.run_dir))
        phase = trial.user_attrs.get(PHASE)  # of an interrupted trial that is tried again
        if phase is None:
            if isinstance(self._sampler, BaqeSampler):
                phase = self._sampler.phase(self._study, trial)
            else:
                phase = type(self._sampler).__name__
        trial.set_user_attr(RESULT, {"phase": phase})
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

    def test_front(self, batches: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        """Accuracy on the test split of the float model and of every Pareto point that lacks it, compiled."""
        if batches is None or self.float_result is None:
            return
        tests: dict[str, float] = dict(self._study.user_attrs.get(TEST, {}))
        for name in ["float", *(name for name, _ in pareto_entries(self.summary()))]:
            if name not in tests:
                tests[name] = deployed_accuracy(Artifact.load(self.run_dir / "artifacts" / name), batches)
                self._study.set_user_attr(TEST, tests)
