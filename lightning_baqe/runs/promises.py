"""Trials that are given up before they are tuned to the end: what they promise, and when that is hopeless."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import optuna

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.evaluation import module_accuracy
from lightning_baqe.runs.study import SearchStudy
from lightning_baqe.runs.summary import Entry
from lightning_baqe.search.knowledge import BoundKnowledge, Knowledge
from lightning_baqe.search.pruning import ParetoPruner
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.tasks.scoring import Batches, Scorer


class Promises:
    """What trials promise: accuracy before the tuning's end, with latency and size as far as they are known.

    A trial promises something before its first epoch (post-training quantization) and after every epoch but the last.
    Where the finished trials tell that it cannot reach the front any more, it is pruned
    (:class:`~lightning_baqe.search.ParetoPruner`).

    Args:
        knowledge: of error, latency and size.
        distributions: of the search's parameters.
        batches: what the accuracy is taken on.
        study: that is told of pruned trials.
        most: trials that may be pruned.
        scorer: what accuracy is; None: what suits outputs and targets.

    Raises:
        ConfigError: latency or size is not known.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        distributions: Mapping[str, optuna.distributions.BaseDistribution],
        batches: Batches,
        study: SearchStudy,
        most: int,
        scorer: Scorer | None = None,
    ) -> None:
        _, latency, size = knowledge.objectives
        if latency is None or size is None:
            raise ConfigError(
                "search.prune weighs a trial's latency before it is tuned, but no kernel was measured: give "
                "search.tune_s > 0, or search.prune=false"
            )
        self._space = SearchSpace({name: d for name, d in distributions.items() if not d.single()})
        self._bound, self._batches = BoundKnowledge(knowledge, self._space), batches
        self._study, self._most, self._scorer = study, most, scorer
        exact = [entry.kind == "exact" for entry in (latency, size)]
        self._pruner = ParetoPruner((None, *(0.0 if known else None for known in exact)))

    def gives_up(self, trial: optuna.Trial, rung: int, model: QuantizedModel, entry: Entry) -> bool:
        """Keep what a trial promises; where that is hopeless, prune it. Returns whether it is pruned.

        Args:
            trial: of the search.
            rung: epochs that it was tuned for.
            model: its fake-quantized network as it is now.
            entry: of the trial, kept if it is pruned, with the seconds spent here.
        """
        start = time.perf_counter()
        accuracy = module_accuracy(model, self._batches, next(model.parameters()).device, self._scorer)
        if not self._study.alone(lambda: self.is_hopeless(trial, rung, accuracy)):
            return False
        if sum(other.state == "pruned" for other in self._study.trials()) >= self._most:
            return False
        spent = entry.seconds.get("estimate", 0.0) + time.perf_counter() - start
        more = {"promised_accuracy": accuracy, "seconds": {**entry.seconds, "estimate": spent}}
        self._study.tell(trial, entry.model_copy(update={"state": "pruned", **more}))
        return True

    def is_hopeless(self, trial: optuna.Trial, rung: int, accuracy: float) -> bool:
        """Keep what the trial promises after ``rung`` epochs (accuracy at most 1), and say whether that is hopeless."""
        row = np.array([self._space.internal(trial.params)])
        _, latency, size = self._bound.estimates(row)[0].tolist()
        self._pruner.report(trial, rung, (1.0 - accuracy, latency, size))
        return self._pruner.should_prune(trial)
