"""What a search finds out before its first trial: kernels, the space, knowledge, whether limits can be met."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning_baqe.costs.bit_rewards import REFERENCE, default_bit_choices, rewards_of
from lightning_baqe.costs.network_knowledge import search_knowledge
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, architecture_signature
from lightning_baqe.quantization.convert import QuantizedModel, quantize
from lightning_baqe.quantization.sensitivity import layer_scores
from lightning_baqe.quantization.sharing import shared_tensors
from lightning_baqe.runs.front import read_limits
from lightning_baqe.runs.limits import Reach
from lightning_baqe.runs.objectives import REFERENCE_POINT
from lightning_baqe.runs.promises import Promises
from lightning_baqe.runs.study import FLOAT_FIGURES, KNOWLEDGE, REWARDS
from lightning_baqe.runs.summary import Figures
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.sampler import BaqeSampler
from lightning_baqe.tuning.network_space import NetworkSpace
from lightning_baqe.tuning.tuner import tune

if TYPE_CHECKING:
    from lightning_baqe.callbacks.search_loop import SearchLoop

TUNED = 4  # knobs that are tried for each kernel before the search
SCORED = 64  # images that the layers' sensitivity is taken on
PROMISED = 8  # validation batches that tell whether a trial is worth its tuning


def prepare(loop: SearchLoop) -> tuple[NetworkSpace, Promises | None]:
    """Open the study, with everything in it that is found out once; what is there already is not found out again.

    Returns:
        The space, and what tells hopeless trials where they are pruned.

    Raises:
        ConfigError: the study was begun under other conditions.
        InfeasibleError: a limit cannot be met at all.
    """
    given, study = loop.arguments, loop.study
    known = study.known_space(_conditions(loop))
    base = BitConfig.uniform(loop.network, 8, 8)
    space = _find_space(loop, base) if known is None else NetworkSpace.from_record(base, known)
    sampler = given.sampler or BaqeSampler(
        seed=given.seed,
        mode=given.mode,
        search_space=space.distributions,
        candidates=space.candidates,
        n_initial=given.n_initial,
        pool_size=max(given.pool_size, given.n_initial),
        reference_point=REFERENCE_POINT,
    )
    study.open(space, sampler)
    reference = study.float_result
    if reference is None:
        bits = BitConfig.uniform(loop.network, FLOAT_BITS, FLOAT_BITS)
        reference = loop.evaluate(quantize(loop.network, bits, loop.example).eval(), "float")
        study.keep(FLOAT_FIGURES, reference.record())
    promises = None
    if isinstance(sampler, BaqeSampler):
        if sampler.mode == "beyond" and loop.wanted > 1:  # a given sampler may know something already
            sampler.knowledge = sampler.knowledge or _find_knowledge(loop, space, reference)
        if given.prune and sampler.knowledge is not None:
            batches = [*islice(loop.validation, PROMISED)]
            promises = Promises(sampler.knowledge, space.distributions, batches, study, loop.wanted)
    limits = read_limits(given.limits)
    study.set_limits(limits)
    if limits:
        eight = BitConfig.uniform(loop.network, REFERENCE, REFERENCE)
        graphs = [lower(loop.quantized(bits, 1)) for bits in (space.extreme(min), eight, space.extreme(max))]
        reach = Reach.of(graphs, given.options, given.measured_on.records, reference.triple[0])
        loop.progress.show(reach.table(limits))
        reach.check(limits, study.summary().entries)
    return space, promises


def _conditions(loop: SearchLoop) -> dict[str, Any]:
    """What may not change while a study goes on."""
    given = loop.arguments
    return {
        "model": given.model_name or type(loop.network).__name__,
        "dataset": loop.host.dataset_name,
        "architecture": architecture_signature(loop.network),
        "bit_choices": list(given.widths),
        "schedules": given.schedules,
        "activation_range": given.activation_range,
        "target": vars(given.options.target),
        "fuse_residual": given.options.fuse_residual,
        "device": fingerprint(given.measured_on.info(given.threads)),
    }


def _uniform(loop: SearchLoop, bits: int) -> QuantizedModel:
    return loop.quantized(BitConfig.uniform(loop.network, bits, bits), 1)


def _find_space(loop: SearchLoop, base: BitConfig) -> NetworkSpace:
    """The space, from the network's kernels at every bit-width; they are tuned first, but not in a dry run."""
    given, records = loop.arguments, loop.arguments.measured_on.records
    graphs: dict[int, IntegerGraph] = {}
    for bits in sorted({*given.widths, FLOAT_BITS}, reverse=True):
        graphs[bits] = lower(_uniform(loop, bits))
        if given.tune_s > 0 and not loop.dry:
            loop.progress.update(f"tuning kernels of {bits} bit")
            tune(graphs[bits], given.options, TUNED, given.tune_s, given.measured_on)
    rewards = None  # where there is nothing to compare with
    if REFERENCE in graphs:
        rewards = rewards_of({b: graph for b, graph in graphs.items() if b != FLOAT_BITS}, given.options, records)
        loop.study.keep(REWARDS, rewards.summary())
    rewarded = given.bit_choices == "auto" and not loop.dry
    offered = default_bit_choices(rewards, given.mode) if rewarded else given.widths
    return NetworkSpace.of(
        {bits: graphs[bits] for bits in offered}, base, given.options,
        given.schedules and given.mode == "paper", records, loop.supported,
    )  # fmt: skip


def _find_knowledge(loop: SearchLoop, space: NetworkSpace, reference: Figures) -> Knowledge:
    """What is known before any trial. It is kept: a search that goes on believes what it began with."""
    record = loop.study.kept(KNOWLEDGE)
    if record is not None:
        return Knowledge.from_record(record)
    loop.progress.update("measuring how sensitive the layers are")
    given, images = loop.arguments, loop.calibration[0]
    offered = {bits for choices in space.bit_choices.values() for bits in choices}
    models = {bits: _uniform(loop, bits) for bits in sorted(offered | {FLOAT_BITS})}
    scores = {b: layer_scores(model, images[:SCORED]) for b, model in models.items() if b != FLOAT_BITS}
    graphs = {bits: lower(model) for bits, model in models.items()}
    known = search_knowledge(
        space, graphs, reference.model_dump(), given.options, given.measured_on.records, scores,
        shared_tensors(loop.network, images[:1], space.base),
    )  # fmt: skip
    loop.study.keep(KNOWLEDGE, known.record())
    return known
