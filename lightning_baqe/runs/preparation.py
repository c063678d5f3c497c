"""What a search finds out before its first trial: kernels, the space, knowledge, whether limits can be met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_baqe.costs.bit_rewards import REFERENCE, Rewards, default_bit_choices, rewards_of
from lightning_baqe.costs.network_knowledge import search_knowledge
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.device import Device
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.sensitivity import layer_scores
from lightning_baqe.quantization.sharing import shared_tensors
from lightning_baqe.runs.limits import Reach
from lightning_baqe.runs.progress import SearchProgress
from lightning_baqe.runs.study import SearchStudy
from lightning_baqe.runs.summary import Figures
from lightning_baqe.search.knowledge import Knowledge
from lightning_baqe.search.sampler import Mode
from lightning_baqe.tuning.network_space import NetworkSpace
from lightning_baqe.tuning.tuner import tune

TUNED = 4  # knobs that are tried for each kernel before the search
SCORED = 64  # images that the layers' sensitivity is taken on


@dataclass(frozen=True)
class Preparation:
    """The work before the first trial. What is found is kept in the study and in the records.

    Args:
        network: the float classifier.
        quantized: bits to the calibrated, untrained network.
        study: of the search.
        device: that is searched for, with the records of its kernels.
        progress: told what is going on.
        options: what is compiled for.
    """

    network: torch.nn.Module
    quantized: Callable[[BitConfig], QuantizedModel]
    study: SearchStudy
    device: Device
    progress: SearchProgress
    options: BuildOptions

    def _uniform(self, bits: int) -> QuantizedModel:
        return self.quantized(BitConfig.uniform(self.network, bits, bits))

    def space(
        self,
        base: BitConfig,
        bit_choices: Sequence[int],
        mode: Mode,
        schedules: bool,
        rewarded: bool,
        tuning_s: float,
        supported: Mapping[str, tuple[int, ...]] | None,
    ) -> NetworkSpace:
        """The space, from the network's kernels at every bit-width; they are tuned first.

        Args:
            base: bits of the layers that are not searched.
            bit_choices: of all others.
            mode: of the search; ``beyond`` searches bits alone.
            schedules: whether mode ``paper`` searches knobs.
            rewarded: offer, of the choices, those that the device rewards in this mode.
            tuning_s: seconds for the kernels at each bit-width; 0: none are tuned.
            supported: ``{layer: bits that the device has kernels for}``; None: all.
        """
        graphs: dict[int, IntegerGraph] = {}
        for bits in sorted({*bit_choices, FLOAT_BITS}, reverse=True):
            graphs[bits] = lower(self._uniform(bits))
            if tuning_s > 0:
                self.progress.say(f"tuning kernels of {bits} bit")
                tune(graphs[bits], self.options, TUNED, tuning_s, self.device)
        rewards = self._rewards(graphs)
        offered = default_bit_choices(rewards, mode) if rewarded else bit_choices
        return NetworkSpace.of(
            {bits: graphs[bits] for bits in offered}, base, self.options,
            schedules and mode == "paper", self.device.records, supported,
        )  # fmt: skip

    def _rewards(self, graphs: Mapping[int, IntegerGraph]) -> Rewards | None:
        """What each bit-width buys, kept for the report; None where there is nothing to compare with."""
        if REFERENCE not in graphs:
            return None
        integer = {bits: graph for bits, graph in graphs.items() if bits != FLOAT_BITS}
        rewards = rewards_of(integer, self.options, self.device.records)
        self.study.set_rewards(rewards.summary())
        return rewards

    def knowledge(self, space: NetworkSpace, images: torch.Tensor) -> Knowledge:
        """What is known before any trial; found out once.

        Args:
            space: of the search.
            images: that the layers' sensitivity is taken on; the first :data:`SCORED` of them.
        """
        known = self.study.knowledge
        if known is None:
            self.progress.say("measuring how sensitive the layers are")
            offered = {bits for choices in space.bit_choices.values() for bits in choices}
            models = {bits: self._uniform(bits) for bits in sorted(offered | {FLOAT_BITS})}
            scores = {b: layer_scores(model, images[:SCORED]) for b, model in models.items() if b != FLOAT_BITS}
            graphs = {bits: lower(model) for bits, model in models.items()}
            known = search_knowledge(
                space, graphs, self._reference().model_dump(), self.options, self.device.records, scores,
                shared_tensors(self.network, images[:1], space.base),
            )  # fmt: skip
            self.study.set_knowledge(known)
        return known

    def check_limits(self, space: NetworkSpace, limits: Mapping[str, float]) -> None:
        """Show what can be reached.

        Raises:
            InfeasibleError: a limit cannot be met at all.
        """
        eight = BitConfig.uniform(self.network, REFERENCE, REFERENCE)
        graphs = [lower(self.quantized(bits)) for bits in (space.extreme(min), eight, space.extreme(max))]
        accuracy = self._reference().triple[0]
        reach = Reach.of(graphs, self.options, self.device.records, accuracy)
        self.progress.show(reach.table(limits))
        reach.check(limits, self.study.summary().entries)

    def _reference(self) -> Figures:
        """The float model's figures, which come before all of this."""
        found = self.study.float_result
        assert found is not None
        return found
