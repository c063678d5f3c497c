"""What one search works with, and what it finds out before its first trial: kernels, the space, knowledge, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_baqe.allocation.evidence import Evidence
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.costs.bit_rewards import REFERENCE, default_bit_choices, rewards_of
from lightning_baqe.costs.network_knowledge import search_knowledge
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.entrance.admission import Network, admit
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, architecture_signature
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.sensitivity import layer_scores
from lightning_baqe.quantization.sharing import shared_in
from lightning_baqe.runs.evaluation import evaluate, module_accuracy, module_scorer
from lightning_baqe.runs.front import read_limits
from lightning_baqe.runs.limits import Reach
from lightning_baqe.runs.objectives import REFERENCE_POINT
from lightning_baqe.runs.progress import SearchProgress
from lightning_baqe.runs.promises import Promises
from lightning_baqe.runs.search_arguments import PRIORS, SearchArguments
from lightning_baqe.runs.study import FLOAT_FIGURES, KNOWLEDGE, REWARDS, SearchStudy
from lightning_baqe.runs.summary import Figures
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.sampler import BaqeSampler
from lightning_baqe.tasks.classifier import loss_of
from lightning_baqe.tasks.scoring import Batches, Scorer, TopOneAccuracy
from lightning_baqe.tuning.network_space import NetworkSpace
from lightning_baqe.tuning.tuner import tune

TUNED = 4  # knobs that are tried for each kernel before the search
SCORED = 64  # images that the layers' sensitivity is taken on
PROMISED = 8  # validation batches that tell whether a trial is worth its tuning


@dataclass(eq=False)
class SearchContext:
    """What a search works with; on other ranks than zero the network's copies alone.

    Attributes:
        network: the float network as the run began with it, on the CPU.
        calibration: inputs of the first training batches, on the CPU.
        example: one input of the network.
        supported: ``{layer: bits that the device has kernels for}``; None: all.
        dry: one trial, nothing else.
        labelled: the first training batch with its targets, on the CPU; empty where the prior needs none.
        wanted: complete trials to reach.
        validation, scorer, study, progress: rank zero's.
    """

    arguments: SearchArguments
    network: torch.nn.Module
    calibration: list[torch.Tensor]
    run_dir: Path
    dataset: str
    dry: bool
    labelled: tuple[torch.Tensor, ...] = ()
    example: torch.Tensor = field(init=False)
    admitted: Network = field(init=False)
    validation: Batches = field(init=False)
    scorer: Scorer = field(init=False)
    study: SearchStudy = field(init=False)
    progress: SearchProgress = field(init=False)

    def __post_init__(self) -> None:
        self.supported = self.arguments.check_bits(self.network)
        given = self.arguments.example_input
        self.example = (self.calibration[0][:1] if given is None else given).detach().cpu()
        self.admitted = admit(self.network, self.example)
        self.wanted = 1 if self.dry else self.arguments.trials

    @property
    def model_name(self) -> str:
        """For the summary."""
        return self.arguments.model_name or type(self.network).__name__

    def open(self, validation: Batches) -> None:
        """Choose what accuracy is, and open the study; rank zero alone.

        Raises:
            ConfigError: outputs and targets that the metric does not take, or that none is known for.
        """
        given, self.validation = self.arguments, validation
        self.scorer = module_scorer(self.network, validation, torch.device("cpu"), given.metric)
        if given.prior != "divergence" and (self.scorer.kind == "values" or not self.scorer.logits):
            raise ConfigError(
                f"prior={given.prior!r} takes the cross entropy of logits, which these outputs are not: leave it out"
            )
        about = {
            "metric": self.scorer.name,
            "recipe": given.recipe,
            "model": self.model_name,
            "dataset": self.dataset,
            "device": given.measured_on.info(given.threads),
        }
        self.study = SearchStudy(self.run_dir, given.storage, about, given.study_name)

    def quantized(self, bits: BitConfig, batches: int | None = None) -> QuantizedModel:
        """The float network at other bits, calibrated on all training batches and corrected as the arguments say; for
        what needs the structure alone, calibrated on so many of them.
        """
        model = quantize(self.admitted, bits, activation_range=self.arguments.activation_range)
        return calibrate(
            model, self.calibration[:batches], correct=self.arguments.correct if batches is None else "none"
        )

    def evaluate(self, model: QuantizedModel, name: str, schedules: Schedules | str | None = None) -> Figures:
        """A network's figures on the device; its artifact gets the name. Without schedules: the best known ones."""
        given, folder = self.arguments, self.run_dir / "artifacts" / name
        return evaluate(
            model, self.validation, folder, given.options, schedules, given.measured_on, given.measurement, self.scorer
        )

    def accuracy(self, model: torch.nn.Module) -> float:
        """Of a fake-quantized network, where it is."""
        return module_accuracy(model, self.validation, next(model.parameters()).device, self.scorer)

    def prepare(self) -> tuple[NetworkSpace, Promises | None]:
        """Open the study, with everything in it that is found out once; what is there already is not found out again.

        Returns:
            The space, and what tells hopeless trials where they are pruned.

        Raises:
            ConfigError: the study was begun under other conditions.
            InfeasibleError: a limit cannot be met at all.
        """
        given, study = self.arguments, self.study
        self.progress.say(f"{self.scorer.line}.")
        known = study.known_space(self._conditions())
        base = BitConfig.uniform(self.network, 8, 8)
        space = self._find_space(base) if known is None else NetworkSpace.from_record(base, known)
        sampler = given.sampler or BaqeSampler(
            seed=given.seed,
            mode=given.mode,
            search_space=space.distributions,
            candidates=space.candidates,
            n_initial=given.n_initial,
            pool_size=max(given.pool_size, given.n_initial),
            reference_point=REFERENCE_POINT,
        )
        study.open(space, sampler, given.recover)
        reference = study.float_result
        if reference is None:
            bits = BitConfig.uniform(self.network, FLOAT_BITS, FLOAT_BITS)
            reference = self.evaluate(quantize(self.admitted, bits).eval(), "float")
            study.keep(FLOAT_FIGURES, reference.record())
        promises = None
        if isinstance(sampler, BaqeSampler):
            if sampler.mode == "beyond" and self.wanted > 1:  # a given sampler may know something already
                sampler.knowledge = sampler.knowledge or self._find_knowledge(space, reference)
            if given.prune and sampler.knowledge is not None:
                batches = [*islice(self.validation, PROMISED)]
                promises = Promises(sampler.knowledge, space.distributions, batches, study, self.wanted, self.scorer)
        limits = read_limits(given.limits)
        study.set_limits(limits)
        if limits:
            eight = BitConfig.uniform(self.network, REFERENCE, REFERENCE)
            graphs = [lower(self.quantized(bits, 1)) for bits in (space.extreme(min), eight, space.extreme(max))]
            reach = Reach.of(graphs, given.options, given.measured_on.records, reference.triple[0])
            self.progress.show(reach.table(limits))
            reach.check(limits, study.summary().entries)
        return space, promises

    def _conditions(self) -> dict[str, Any]:
        """What may not change while a study goes on."""
        given = self.arguments
        return {
            "model": self.model_name,
            "dataset": self.dataset,
            # Studies of before there was a choice say nothing, and that is what they counted.
            "metric": None if type(self.scorer.metric) is TopOneAccuracy else self.scorer.name,
            "architecture": architecture_signature(self.network),
            "bit_choices": list(given.widths),
            "schedules": given.schedules,
            "activation_range": given.activation_range,
            "correct": None if given.correct == "none" else given.correct,  # as of before there was a choice
            "prior": None if given.prior == "divergence" else given.prior,
            "target": vars(given.options.target),
            "fuse_residual": given.options.fuse_residual,
            "device": fingerprint(given.measured_on.info(given.threads)),
        }

    def _uniform(self, bits: int) -> QuantizedModel:
        return self.quantized(BitConfig.uniform(self.network, bits, bits), 1)

    def _find_space(self, base: BitConfig) -> NetworkSpace:
        """The space, from the network's kernels at every bit-width; they are tuned first, but not in a dry run."""
        given, records = self.arguments, self.arguments.measured_on.records
        graphs: dict[int, IntegerGraph] = {}
        for bits in sorted({*given.widths, FLOAT_BITS}, reverse=True):
            graphs[bits] = lower(self._uniform(bits))
            if given.tune_s > 0 and not self.dry:
                self.progress.update(f"tuning kernels of {bits} bit")
                tune(graphs[bits], given.options, TUNED, given.tune_s, given.measured_on)
        rewards = None  # where there is nothing to compare with
        if REFERENCE in graphs:
            rewards = rewards_of({b: graph for b, graph in graphs.items() if b != FLOAT_BITS}, given.options, records)
            self.study.keep(REWARDS, rewards.summary())
        rewarded = given.bit_choices == "auto" and not self.dry
        offered = default_bit_choices(rewards, given.mode) if rewarded else given.widths
        return NetworkSpace.of(
            {bits: graphs[bits] for bits in offered}, base, given.options,
            given.schedules and given.mode == "paper", records, self.supported,
        )  # fmt: skip

    def _find_knowledge(self, space: NetworkSpace, reference: Figures) -> Knowledge:
        """What is known before any trial. It is kept: a search that goes on believes what it began with."""
        record = self.study.kept(KNOWLEDGE)
        if record is not None:
            return Knowledge.from_record(record)
        self.progress.update("measuring how sensitive the layers are")
        given, images = self.arguments, self.calibration[0]
        offered = {bits for choices in space.bit_choices.values() for bits in choices}
        models = {bits: self._uniform(bits) for bits in sorted(offered | {FLOAT_BITS})}
        kind = self.scorer.kind
        if given.prior == "divergence":
            scores = {b: layer_scores(model, images[:SCORED], kind) for b, model in models.items() if b != FLOAT_BITS}
        else:
            scores = self._labelled_scores(models)
        graphs = {bits: lower(model) for bits, model in models.items()}
        known = search_knowledge(
            space, graphs, reference.model_dump(), given.options, given.measured_on.records, scores,
            shared_in(OpReader(self.admitted.graph, self.admitted.graph.graph), space.base),
        )  # fmt: skip
        self.study.keep(KNOWLEDGE, known.record())
        return known

    def _labelled_scores(self, models: Mapping[int, QuantizedModel]) -> dict[int, dict[str, float]]:
        """``{bits: {layer: sensitivity}}`` by the prior that the user chose."""
        x, y = self.labelled
        batch = (x[:SCORED], y[:SCORED])
        narrow = {bits: model.eval() for bits, model in models.items() if bits != FLOAT_BITS}
        evidence = Evidence(narrow, [batch], loss_of, self.scorer.kind, seed=self.arguments.seed)
        found = PRIORS[self.arguments.prior].measure(evidence).values
        return {bits: {layer: of[bits] for layer, of in found.items() if bits in of} for bits in narrow}
