"""What a batch holds for the network: one way to read it, whatever loader or library made it.

| a batch | the network's input | the labels |
| --- | --- | --- |
| tensor or NumPy array | itself | none |
| tuple or list, ``(x, y, ...)`` | the first element | the second |
| mapping, named tuple, dataclass | the one value under a name of :data:`INPUTS` | that of :data:`LABELS` |

Names are compared in lower case. Whatever else there is has no certain meaning and is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_baqe.errors import BaqeError, CalibrationError

INPUTS = ("x", "image", "images", "img", "imgs", "pixel_values", "input", "inputs", "jpg", "jpeg", "png", "webp")
LABELS = ("y", "label", "labels", "target", "targets", "cls", "class", "class_id")
_WANTED = (
    "wanted is x, (x, y), or a dict with one of {names}: tensors or arrays, as in "
    '((batch["my_images"], batch["my_labels"]) for batch in loader)'
)


def network_input(batch: Any, source: str, error: type[BaqeError] = CalibrationError) -> torch.Tensor:
    """The network's input ``(n, ...)`` of a batch; an array is copied into a tensor.

    Args:
        batch: see the table above.
        source: who gives it, for the message: ``"the training loader"``.
        error: what is raised.

    Raises:
        CalibrationError: or ``error``: nothing in it, or several things, can be the input; says what it holds.
    """
    fields = _fields(batch)
    if fields is None and isinstance(batch, tuple | list) and batch:
        inner = _fields(batch[0])
        found = [batch[0]] if inner is None else _named(inner, INPUTS)
    else:
        found = [batch] if fields is None else _named(fields, INPUTS)
    tensors = [tensor for tensor in map(_tensor, found) if tensor is not None]
    if len(tensors) != 1:
        raise error(f"{source} gives {describe(batch)}; {_WANTED.format(names=', '.join(INPUTS))}")
    return tensors[0]


def network_inputs(batch: Any, names: Sequence[str], source: str) -> tuple[torch.Tensor, ...]:
    """The inputs of a network that has several.

    Args:
        batch: a mapping with the names of forward's arguments, ``(x1, x2, ...)`` or ``((x1, x2), ...)``; what follows
            is not read.
        names: of forward's arguments.
        source: as of :func:`network_input`.

    Raises:
        CalibrationError: it is none of these.
    """
    fields, found = _fields(batch), []
    if fields is not None:
        found = [fields[name] for name in names if name in fields]
    elif isinstance(batch, tuple | list) and batch:
        found = list(batch[0] if isinstance(batch[0], tuple | list) else batch)[: len(names)]
    tensors = [tensor for tensor in map(_tensor, found) if tensor is not None]
    if len(tensors) != len(names):
        raise CalibrationError(
            f"{source} gives {describe(batch)}; wanted are the network's {len(names)} inputs {', '.join(names)}, as a "
            "tuple or by these names"
        )
    return tuple(tensors)


def input_and_labels(
    batch: Any, source: str, error: type[BaqeError] = CalibrationError
) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's input ``(n, ...)`` and the labels of a batch; arguments and errors of :func:`network_input`."""
    x, fields = network_input(batch, source, error), _fields(batch)
    if fields is not None:
        found = _named(fields, LABELS)
    else:
        found = [batch[1]] if isinstance(batch, tuple | list) and len(batch) > 1 else []
    tensors = [tensor for tensor in map(_tensor, found) if tensor is not None]
    if len(tensors) != 1:
        raise error(
            f"{source} gives {describe(batch)}; wanted are batches (x, y) of tensors, images and class indices, or a "
            f"dict with the latter under one of {', '.join(LABELS)}"
        )
    return x, tensors[0]


def describe(batch: Any) -> str:
    """A batch in words, for error messages: types, names, shapes."""
    fields = _fields(batch)
    if fields is not None:
        return f"a {type(batch).__name__} of {{{', '.join(f'{name!r}: {describe(v)}' for name, v in fields.items())}}}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of ({', '.join(_some(batch))})"
    if isinstance(batch, torch.Tensor | np.ndarray):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    return f"a {type(batch).__name__}"


def _some(values: tuple[Any, ...] | list[Any], most: int = 4) -> Iterator[str]:
    yield from (describe(value) for value in values[:most])
    if len(values) > most:
        yield f"{len(values) - most} more"


def _fields(batch: Any) -> dict[str, Any] | None:
    """The values of a batch whose parts have names, None for any other."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _named(fields: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [value for name, value in fields.items() if name.lower() in names]


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(value)
    return None
