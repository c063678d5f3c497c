"""What each kernel of a plan takes, alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from lightning_baqe.deploy.compiler import result_type
from lightning_baqe.deploy.conv_template import ConvSpec
from lightning_baqe.deploy.depthwise_template import DepthwiseSpec
from lightning_baqe.deploy.kernels import Call, Plan
from lightning_baqe.deploy.layout import Layout


def kernel_table(plan: Plan) -> list[dict[str, Any]]:
    """Latency of every kernel call of a plan, each alone and on zeros.

    Returns:
        ``{"nodes", "kernel", "knobs", "macs", "latency_us"}`` in order.
    """
    functions = {call.key: call.function().with_attr("global_symbol", call.key) for call in plan.calls}
    library = tvm.compile(tvm.IRModule(functions), target=Target(plan.target.tvm))
    taken: dict[str, float] = {}
    rows = []
    for call in plan.calls:
        if call.key not in taken:
            timer = library.mod.time_evaluator(call.key, tvm.cpu(), number=1, repeat=7, min_repeat_ms=5)
            taken[call.key] = timer(*_arguments(call, plan)).median * 1e6
        rows.append(
            {
                "nodes": list(call.nodes),
                "kernel": call.key,
                "knobs": dict(call.knobs),
                "macs": _macs(call),
                "latency_us": taken[call.key],
            }
        )
    return rows


def _arguments(call: Call, plan: Plan) -> list[Any]:
    arguments = []
    for argument in call.arguments:
        if isinstance(argument, np.ndarray):
            arguments.append(tvm.runtime.tensor(np.ascontiguousarray(argument)))
        elif argument in plan.layouts:
            layout: Layout = plan.layouts[argument]
            arguments.append(tvm.runtime.tensor(np.zeros(layout.length, layout.dtype)))
        else:  # the network's input
            result = plan.layouts[call.result]
            image = np.zeros((1, result.channels, result.height, result.width), np.float32)
            arguments.append(tvm.runtime.tensor(image))
    out = result_type(call, plan)
    shape = tuple(int(extent) for extent in out.shape)
    return [*arguments, tvm.runtime.tensor(np.zeros(shape, str(out.dtype)))]


def _macs(call: Call) -> int:
    return call.spec.macs if isinstance(call.spec, ConvSpec | DepthwiseSpec) else 0
