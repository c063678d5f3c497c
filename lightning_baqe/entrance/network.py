"""What a network must be before anything else is done with it, and what it is wrapped in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.quantization.wrappers import refuse_lazy, unwrapped

BATCH = 2  # a batch of one is a special case to torch.export, and to what squeezes


def named_network(model: nn.Module) -> nn.Module:
    """The network itself, without what it is wrapped in.

    Raises:
        ConfigError: it is no network, or quantized already.
        UnsupportedModelError: it is a ScriptModule.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a network is an nn.Module, got a {type(model).__name__}")
    if isinstance(model, QuantizedModel) or any(hasattr(m, "weight_quantizer") for m in model.modules()):
        raise ConfigError("the network is quantized already; quantize the float model instead")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a TorchScript module, which cannot be traced again; give the nn.Module that it "
            "was made from"
        )
    return model


def refuse_unfit(model: nn.Module) -> None:
    """Refuse what cannot be right, whatever the input.

    Raises:
        UnsupportedModelError: lazy, pruned, parametrized or normalised weights, other types than float32, numbers that
            are not finite; names the module and what to do.
    """
    for name, module in model.named_modules():
        _refuse_changed_weights(name or type(model).__name__, module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        refuse_lazy(name, tensor)
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name!r} is on the meta device: it has no values; load the weights first")
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise UnsupportedModelError(
                f"{name!r} has the dtype {tensor.dtype}, but float32 is wanted: call .float() on the network first"
            )
        # Masks and limits may be infinite; weights and statistics may not.
        is_number = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        bad = int((~torch.isfinite(tensor)).sum() if is_number else tensor.isnan().sum())
        if bad:
            raise UnsupportedModelError(
                f"{name!r} has {bad} of {tensor.numel()} values that are not finite; train or load the network again"
            )
    for name, module in model.named_modules():
        variance = getattr(module, "running_var", None)
        if isinstance(variance, torch.Tensor) and bool((variance < 0).any()):
            raise UnsupportedModelError(
                f"'{name}.running_var' has negative values, whose square root is not finite; train or load the network "
                "again"
            )


_BY_HOOKS = {
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(module, {name!r})",
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
}


def _refuse_changed_weights(name: str, module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        raise UnsupportedModelError(
            f"module {name!r} ({type(module).__name__}) is parametrized; call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    for hook in module._forward_pre_hooks.values():
        for kind, advice in _BY_HOOKS.items():
            if isinstance(hook, kind):
                tensor = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                raise UnsupportedModelError(
                    f"module {name!r} ({type(module).__name__}): a hook ({type(hook).__name__}) computes its "
                    f"{tensor!r} at each call, a reparametrization that quantization would undo; make it permanent by "
                    f"{advice.format(name=tensor)} first"
                )


def as_inputs(example_input: Any, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """A network's inputs as a tuple of batches of two, on its device.

    Args:
        example_input: a batch of any size, or a tuple or list with one for each input.

    Raises:
        ConfigError: it is anything else.
    """
    given: Sequence[Any] = example_input if isinstance(example_input, tuple | list) else (example_input,)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    found = []
    for tensor in given:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2 or not len(tensor):
            shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else ""
            raise ConfigError(
                "example_input must be a batch of the network's inputs, (n, ...) with n of at least 1, or a tuple with "
                f"one batch for each input; got a {type(tensor).__name__}{shape}"
            )
        repeated = tensor if len(tensor) >= BATCH else tensor.expand(BATCH, *tensor.shape[1:])
        found.append(repeated[:BATCH].detach().to(device).contiguous())
    return tuple(found)


@torch.no_grad()
def run_float(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """What the network returns in eval mode; UnsupportedModelError if it does not run on these inputs."""
    with evaluating(model):
        try:
            return model(*inputs)
        except Exception as error:  # the network's own code: whatever it raises is named and raised again
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on example_input (batches of shape {shapes}): "
                f"{type(error).__name__}: {error}"
            ) from error
