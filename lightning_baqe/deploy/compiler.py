"""A plan as one Relax VM module."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.objects import KernelObjects
from lightning_baqe.errors import BuildError
from lightning_baqe.interrupts import postponed
from lightning_baqe.kernels.x86.layout import as_image

MAIN, ALL = "main", "main_all"


def constants(plan: Plan) -> list[np.ndarray]:
    """The constant arguments of all calls, in the order in which the module's functions take them."""
    return [plan.constants[a] for call in plan.calls for a in call.arguments if a in plan.constants]


def compile_plan(plan: Plan, input_shape: tuple[int, ...], objects: KernelObjects | None = None) -> Any:
    """Compile those kernels that never were, and the functions that call them, to a ``tvm.relax.Executable``.

    To Relax, kernels are packed functions known by name, whose object files are linked to the module.

    The module has two functions of (image, *constants): ``main`` returns the logits, ``main_all`` a tuple of every
    call's results in order.

    ``input_shape`` is ``(channels, height, width)`` or ``(features,)``; ``objects`` keeps compiled kernels, by default
    the user's. BuildError where TVM or LLVM refuses the module, or an operator of an island.
    """
    builder = relax.BlockBuilder()
    for name, keep_all in ((MAIN, False), (ALL, True)):
        image = relax.Var("image", relax.TensorType((1, *as_image(input_shape)), "float32"))
        arrays = constants(plan)
        parameters = [relax.Var(f"c{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]
        # Kernels write into their last arguments; nothing may reorder or drop their calls, so none is said to be pure.
        with builder.function(name, [image, *parameters], {"relax.force_pure": True}):
            values: dict[str, Any] = {}
            results = []
            remaining = iter(parameters)
            for call in plan.calls:
                arguments = [
                    next(remaining) if a in plan.constants else values.get(plan.buffer(a), image)
                    for a in call.arguments
                ]
                buffers = [plan.buffer(name) for name in call.results]
                for name, buffer in zip(call.results, buffers, strict=True):
                    if buffer not in values:  # else another slice of what an earlier call began
                        out = result_type(name, plan)
                        values[buffer] = builder.emit(relax.op.builtin.alloc_tensor(out.shape, str(out.dtype), 0))
                written = [values[buffer] for buffer in buffers]
                kernel = relax.ExternFunc(call.key)
                builder.emit(relax.Call(kernel, [*arguments, *written], ty_args=[relax.TupleType([])]))
                results += written
            builder.emit_func_output(relax.Tuple(results) if keep_all else values[plan.output])
    kept = KernelObjects() if objects is None else objects
    kernels = {call.key: call for call in plan.calls}
    try:
        libraries = [kept.library(key, plan.options.target, call.function) for key, call in kernels.items()]
        module = builder.get().with_attr("external_mods", libraries)
        with postponed(), tvm.transform.PassContext(opt_level=3):
            return relax.build(module, target=Target(plan.options.target.tvm), relax_pipeline="default_build")
    except (RuntimeError, ValueError) as error:
        raise BuildError(f"TVM cannot compile the network for {plan.options.target.mcpu}: {error}") from error


def result_type(name: str, plan: Plan) -> Any:
    """The Relax type of a value: a flat buffer in our layout, or ``(1, size)``."""
    if name in plan.plain:
        return relax.TensorType((1, plan.plain[name]), "float32")
    layout = plan.layouts[name]
    return relax.TensorType((layout.length,), layout.dtype)
