"""Integer graphs as ONNX models of the QDQ form: the way to devices that TVM does not reach.

Every integer tensor becomes a pair of QuantizeLinear and DequantizeLinear, every operator the standard float operator
between them, every layer's weights int8 (or uint8, or int4) by channel with positive scales, its bias int32 of scale
``s_x * s_w``. Engines fuse such a group into one integer kernel; ONNX Runtime does so for convolutions, matrix
products, sums, products, concatenations, poolings and whatever only moves elements.

What differs from :meth:`~lightning_baqe.integer.graph.IntegerGraph.run`:

- What rounding took from a bias (``fraction``) has no place in ONNX: a bias is off by up to half a step of the
  accumulator. Weights of fewer than 8 bits are stored times a power of two, within 7 bits, which makes those steps
  finer; packed as INT4 they are not, and then the error can be a good part of a step of the output.
- Engines scale in float32 and round to the nearest integer, halves to even; here halves go up.
- ONNX Runtime rounds once where a tensor is brought onto a second 8-bit grid that alone reads it.
- A tensor of more than 8 bits (a residual stream in int32) stays float between its operators: ONNX dequantizes int32
  but has nothing that quantizes to it. What reads it quantizes it.
- On x86 CPUs without VNNI, ONNX Runtime by default adds pairs of products of uint8 and int8 in 16 bits, which saturate.
  So weights that could do that are stored as uint8 with the zero point 128, which it adds exactly everywhere (on CPUs
  with VNNI more slowly). With ``signed_weights`` they are int8, and
  ``options.add_session_config_entry("session.x64quantprecision", "1")`` makes its sums exact.
- Tables are the functions that they were made of, in float between the pairs. A table that holds anything else stays
  one, looked up exactly.

A range narrower than its 8 bits (fewer activation bits, a ReLU on a grid with a zero point) is clipped between a
second pair, so that the first still fuses with the operator before it. A ReLU at zero point 0 is what QuantizeLinear
does by itself.
"""

from __future__ import annotations

from pathlib import Path

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.graph import IntegerGraph

OPSET = 23  # the newest that ONNX Runtime 1.23, the oldest release tested, reads
MIN_OPSET = 21  # the first with 4-bit integers
INSTALL = "pip install 'lightning-baqe[onnx]'"


def export_onnx(
    graph: IntegerGraph, path: str | Path, opset: int = OPSET, pack_int4: bool = False, signed_weights: bool = False
) -> Path:
    """Write a graph as an ONNX model.

    Its input is ``input``, float32 ``(n, *graph.input_shape)`` (of several inputs ``input``, ``input_1``, ... each in
    its shape), its output ``logits``, float32 ``(n, *graph.output_shape)``, for any n. The metadata hold the bits of
    every layer as JSON, ``lightning_baqe.bits``: ``{layer: [weight, activation]}`` with 32 for float, and the layers
    that are stored as INT4, ``lightning_baqe.int4``.

    Args:
        graph: what :func:`lightning_baqe.lower` returned.
        path: of the file.
        opset: 21 to the newest that the installed onnx knows.
        pack_int4: store weights of at most 4 bits as INT4, half the size; few engines compute with them. A layer where
            the flipped sign of a channel makes an 8 of a -8 stays int8.
        signed_weights: no uint8 weights, for engines that take none.

    Returns:
        ``path``.

    Raises:
        ConfigError: onnx is not installed, or has no such opset.
        UnsupportedModelError: the graph ends in integers, or holds numbers that have no place in ONNX: weights beyond
            int8, padding that is not 0, a table on more than 8 bits that no function stands for.
    """
    try:
        from lightning_baqe.onnx.qdq_graph import make_model, newest_opset
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "onnx":
            raise
        raise ConfigError(f"the export to ONNX needs the package onnx, which is not installed: {INSTALL}") from error
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= newest_opset():
        raise ConfigError(
            f"opset must be an integer within {MIN_OPSET}..{newest_opset()} (what the installed onnx knows), got "
            f"{opset!r}; engines read {OPSET}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_model(graph, opset, pack_int4, signed_weights).SerializeToString(deterministic=True))
    return path
