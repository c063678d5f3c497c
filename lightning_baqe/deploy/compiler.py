"""A plan as one Relax VM module."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from lightning_baqe.deploy.kernels import Call, Plan
from lightning_baqe.deploy.layout import Layout
from lightning_baqe.deploy.pixel_templates import PixelSpec
from lightning_baqe.errors import BuildError

MAIN, ALL = "main", "main_all"


def constants(plan: Plan) -> list[np.ndarray]:
    """The constant arguments of all calls, in the order in which the module's functions take them."""
    return [np.ascontiguousarray(a) for call in plan.calls for a in call.arguments if isinstance(a, np.ndarray)]


def compile_plan(plan: Plan, input_shape: tuple[int, ...]) -> Any:
    """Compile all kernels and the function that calls them.

    The module has two functions of (image, *constants): ``main`` returns the logits, ``main_all`` a tuple of every
    call's result in order.

    Args:
        plan: the kernel calls.
        input_shape: ``(channels, height, width)``.

    Returns:
        a ``tvm.relax.Executable``.

    Raises:
        BuildError: TVM or LLVM refuses the module.
    """
    builder = relax.BlockBuilder()
    functions: dict[str, Any] = {}
    for call in plan.calls:
        if call.key not in functions:
            functions[call.key] = builder.add_func(call.function().with_attr("global_symbol", call.key), call.key)
    for name, keep_all in ((MAIN, False), (ALL, True)):
        image = relax.Var("image", relax.TensorType((1, *input_shape), "float32"))
        arrays = constants(plan)
        parameters = [relax.Var(f"c{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]
        with builder.function(name, [image, *parameters]):
            values: dict[str, Any] = {}
            results = []
            remaining = iter(parameters)
            for call in plan.calls:
                arguments = [
                    next(remaining) if isinstance(a, np.ndarray) else values.get(plan.buffer(a), image)
                    for a in call.arguments
                ]
                kernel, out, buffer = functions[call.key], result_type(call, plan), plan.buffer(call.result)
                if buffer in values:  # another slice of what an earlier call began
                    emitted = relax.op.call_tir_inplace(kernel, [*arguments, values[buffer]], [len(arguments)], out)
                else:
                    emitted = relax.call_tir(kernel, arguments, out_ty=out)
                values[buffer] = builder.emit(emitted)
                results.append(values[buffer])
            builder.emit_func_output(relax.Tuple(results) if keep_all else results[-1])
    module = builder.get()
    try:
        with tvm.transform.PassContext(opt_level=3):
            return relax.build(module, target=Target(plan.target.tvm), relax_pipeline="default_build")
    except (RuntimeError, ValueError) as error:
        raise BuildError(f"TVM cannot compile the network for {plan.target.mcpu}: {error}") from error


def result_type(call: Call, plan: Plan) -> Any:
    """The Relax type of a call's result: a flat buffer, or the logits."""
    spec = call.spec
    if isinstance(spec, PixelSpec) and spec.op in ("logits", "unpack"):
        source = spec.source
        return relax.TensorType((1, source.channels * source.height * source.width), "float32")
    layout: Layout = plan.layouts[call.result]
    return relax.TensorType((layout.length,), layout.dtype)
