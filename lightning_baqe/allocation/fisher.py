"""Sensitivities from squared gradients: the Fisher information's diagonal in the place of the Hessian's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_baqe.allocation.evidence import Evidence, Sensitivities, Sensitivity, float_free
from lightning_baqe.allocation.layer_gradients import layer_gradients
from lightning_baqe.quantization.config import FLOAT_BITS


@dataclass(frozen=True)
class Fisher(Sensitivity):
    """``1/2 sum_j F_jj error_j^2`` over a layer's weights and its input, with F the mean over images of squared
    gradients of an image's own loss at its given label (the empirical Fisher). One backward pass an image.
    """

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits."""
        layerwise = evidence.layerwise
        values = {name: dict.fromkeys(bits, 0.0) for name, bits in layerwise.choices.items()}
        squares: dict[str, Any] = dict.fromkeys(values, 0.0)
        done = 0
        for share, x, y in evidence.chunks(1):
            found = layer_gradients(evidence, x, y)
            for name, by_bits in values.items():
                squares[name] += share * layerwise.outputs_first(name, found.at_weight[name]).square()
                for call, (values_in, gradient) in enumerate(
                    zip(found.inputs.get(name, ()), found.at_input.get(name, ()), strict=True)
                ):
                    for bits in by_bits:
                        with torch.no_grad():
                            error = layerwise.input_error(name, bits, values_in, call)
                        by_bits[bits] += 0.5 * share * float((gradient * error).square().sum())
            done += len(x)
            evidence.tell(done, evidence.image_count)
        for name, by_bits in values.items():
            for bits in by_bits:
                by_bits[bits] += 0.5 * float((squares[name] * layerwise.weight_error(name, bits).square()).sum())
        return Sensitivities(float_free(values, layerwise.choices))


@dataclass(frozen=True)
class OutputFisher(Sensitivity):
    """The gradient scoring of NVIDIA ModelOpt's ``auto_quantize``: the sum over a layer's output of its squared
    gradient times its squared error, halved, the mean over images. One backward pass a batch, however many bits.

    Args:
        chunk: images at once.
    """

    chunk: int = 16

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits."""
        layerwise = evidence.layerwise
        values = {name: dict.fromkeys(bits, 0.0) for name, bits in layerwise.choices.items()}
        done = 0
        for share, x, y in evidence.chunks(self.chunk):
            found = layer_gradients(evidence, x, y)
            with torch.no_grad():
                for name, by_bits in values.items():
                    layer = layerwise.network.get_submodule(layerwise.paths[name])
                    for call, (values_in, gradient) in enumerate(
                        zip(found.inputs.get(name, ()), found.at_output.get(name, ()), strict=True)
                    ):
                        # Of the images' own losses, of which the batch has the mean.
                        weights, exact = (gradient * len(x)).square() / len(x), layer(values_in)
                        for bits in by_bits:
                            error = layerwise.output(name, bits, values_in, call) - exact
                            by_bits[bits] += 0.5 * share * float((weights * error.square()).sum())
            done += len(x)
            evidence.tell(done, evidence.image_count)
        return Sensitivities(float_free(values, layerwise.choices))


@dataclass(frozen=True)
class PairwiseFisher(Sensitivity):
    """The Fisher information's quadratic form in the errors of all layers' outputs: half the mean over images of the
    square of ``sum_l <g_l, e_l>``, with g the gradient of an image's own loss at a layer's output and e that output's
    error. Terms between layers are those of layers that both have a choice.

    What CLADO measures by a loss for each two choices of each two layers, this estimates from one backward pass a
    batch. The integer program is quadratic, and convex on what images tell.

    Args:
        chunk: images at once.
    """

    chunk: int = 16

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits, and of pairs."""
        layerwise, parts = evidence.layerwise, []
        options = [(name, bits) for name, of in layerwise.choices.items() for bits in of if bits != FLOAT_BITS]
        done = 0
        for _, x, y in evidence.chunks(self.chunk):
            found, rises = layer_gradients(evidence, x, y), torch.zeros(len(options), len(x), dtype=torch.float64)
            with torch.no_grad():
                for row, (name, bits) in enumerate(options):
                    layer = layerwise.network.get_submodule(layerwise.paths[name])
                    for call, (values_in, gradient) in enumerate(
                        zip(found.inputs.get(name, ()), found.at_output.get(name, ()), strict=True)
                    ):
                        error = layerwise.output(name, bits, values_in, call) - layer(values_in)
                        # The batch has the mean of its images' own losses.
                        rises[row] += (gradient * error).flatten(1).sum(1).double().cpu() * len(x)
            parts.append(rises)
            done += len(x)
            evidence.tell(done, evidence.image_count)
        by_image = torch.cat(parts, 1)
        products = (by_image @ by_image.T / by_image.shape[1]).tolist()
        values: dict[str, dict[int, float]] = {name: {} for name in layerwise.choices}
        pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for i, (one, a) in enumerate(options):
            values[one][a] = 0.5 * products[i][i]
            for j, (other, b) in enumerate(options[i + 1 :], i + 1):
                if one != other and min(len(layerwise.choices[one]), len(layerwise.choices[other])) > 1:
                    pairs.setdefault((one, other), {})[a, b] = products[i][j]
        return Sensitivities(float_free(values, layerwise.choices), pairs)
