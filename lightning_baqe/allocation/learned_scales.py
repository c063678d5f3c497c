"""The scales that training leaves, as sensitivities (LIMPQ)."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch

from lightning_baqe.allocation.evidence import Evidence, Sensitivities, Sensitivity, float_free
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.quantization.sensitivity import quantizers_of_layers


@dataclass(frozen=True)
class LearnedScales(Sensitivity):
    """LIMPQ (Tang et al., 2022): a layer's learned step sizes, of its weights (the mean over channels) and of its
    input, are the larger the less it can spare. Each width's network is trained for a moment, on a copy.

    Args:
        steps: of training; 0: the scales as the models have them.
        learning_rate: of SGD with momentum, for weights and scales.
        input_weight: of the input's scale in the sum (alpha in the paper).
    """

    steps: int = 50
    learning_rate: float = 1e-3
    input_weight: float = 1.0

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits."""
        choices = evidence.layerwise.choices
        values: dict[str, dict[int, float]] = {name: {} for name in choices}
        models = [m for bits, m in sorted(evidence.models.items()) if m is not None and bits != FLOAT_BITS]
        batches = [(x, y) for x, y in evidence.batches if len(x) > 1] or evidence.batches  # batch norms want several
        for place, model in enumerate(models):
            trained = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(trained.parameters(), self.learning_rate, momentum=0.9)
            with torch.enable_grad(), torch.random.fork_rng():
                torch.manual_seed(evidence.seed)
                for step, (x, y) in enumerate(itertools.islice(itertools.cycle(batches), self.steps)):
                    loss = evidence.loss(trained(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    evidence.tell(place * self.steps + step + 1, len(models) * self.steps)
            for name, own in quantizers_of_layers(trained).items():
                scales = float(own.weight.scale.detach().mean())
                scales += self.input_weight * sum(call[-1].step() for call in own.calls if call)
                values[name].setdefault(own.width, scales)
        return Sensitivities(float_free(values, choices))
