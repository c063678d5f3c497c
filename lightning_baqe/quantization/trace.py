"""From a user's network to a graph of torch's own layers and ATen operators.

``torch.export`` runs the network in eval mode and records what reaches PyTorch's operators: so subclasses, hooks,
patched methods, autograd functions, default arguments, views and control flow on sizes need no rules of ours. Here the
record becomes a graph that can be trained again: layers, batch norms and dropouts are plain modules of torch's classes
under their own names, with the parameters that they had, whatever class they came from.
"""

from __future__ import annotations

import copy
import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.quantization.aten import (
    DROPOUTS,
    FILLS,
    FIRST_OF,
    KINDS,
    LAYERS,
    NORMS,
    ORIGIN,
    WRITES,
    Origin,
    bound,
    is_random,
    name_of,
)
from lightning_baqe.quantization.config import LAYER_TYPES, layers
from lightning_baqe.quantization.layer_makers import make_batch_norm, make_conv, make_linear
from lightning_baqe.quantization.pointwise import is_pointwise
from lightning_baqe.quantization.recording import label_of, record, scope, scopes, tensor_shape
from lightning_baqe.quantization.train_modes import is_frozen

aten = torch.ops.aten
_CONVS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv_transpose2d": nn.ConvTranspose2d,
}
_DROPOUTS: dict[str, Callable[[float], nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
_MODULES = (*LAYER_TYPES, nn.modules.batchnorm._BatchNorm)
# A view of what lies otherwise in memory (channels last) is an error, a reshape is not.
_LENIENT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._unsafe_index.Tensor: aten.index.Tensor,
}
_IGNORED = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check")
Output = TypeVar("Output")
_TAKEN = frozenset({
    *dir(fx.GraphModule), *vars(fx.GraphModule({}, fx.Graph())), "record", "bits", "quantizers",
    "activation_quantizers",
})  # fmt: skip


def trace(model: nn.Module, example: Sequence[torch.Tensor], output: str | int | None = None) -> fx.GraphModule:
    """The network that ``model`` computes in eval mode, as a graph that can be trained; ``model`` stays as it is.

    Nodes are layers, batch norms and dropouts (``call_module``), ATen operators without side effects, and constants
    (``get_attr``). Dropouts and batch norms follow train and eval, as does what drops branches by chance; whatever
    else training alone has (auxiliary classifiers) is left out. Each node has its
    :class:`~lightning_baqe.quantization.aten.Origin`.

    Layers keep the weights that they compute at this moment, and have the padding that the example's size asks for.

    Args:
        model: any network; what it is called with besides the example has defaults.
        example: its inputs, each a batch of two or more; all further sizes are fixed.
        output: of several outputs, the key or number of the one that is wanted.

    Raises:
        UnsupportedModelError: it cannot be traced; names the module and the reason.
        ConfigError: it has several outputs and ``output`` names none of them.
    """
    return _Rebuilder(model, record(model, example)).graph_module(output)


class _Rebuilder:
    """Makes modules of the operators that have parameters or a training mode."""

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.model, self.program = model, program
        self.layers = frozenset(layers(model))
        self.modules = dict(model.named_modules())
        names = {id(module): name for name, module in self.modules.items()}
        # A module that stands at several paths is the one at the first.
        self.first = {path: names[id(m)] for path, m in model.named_modules(remove_duplicate=False)}
        self.root, self.graph = nn.Module(), fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.made: dict[str, tuple[Any, ...]] = {}  # how the module at each path was made
        self.tensors: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
        self.copies: dict[int, torch.Tensor] = {}
        self.names: dict[fx.Node, str] = {}  # parameters, buffers and constants by their placeholders
        placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        for spec in program.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                owner, dot, leaf = cast(str, spec.target).rpartition(".")
                self.names[placeholders[spec.arg.name]] = f"{self.first.get(owner, owner)}{dot}{leaf}"
        self.evaluated: dict[fx.Node, Any] = {}
        self.varying, self.fixed = self._dependencies()

    def _dependencies(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes that depend on the network's inputs, and the tensors that depend on nothing that trains either."""
        varying: set[fx.Node] = set()
        fixed: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            is_input = node.op == "placeholder" and node not in self.names
            if is_input or any(source in varying for source in node.all_input_nodes):
                varying.add(node)
            elif node in self.names:
                if not self.tensors[self.names[node]].requires_grad:
                    fixed.add(node)
            elif all(source in fixed for source in node.all_input_nodes):
                fixed.add(node)
        calls = {n for n in fixed if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)}
        return varying, calls

    def graph_module(self, output: str | int | None) -> fx.GraphModule:
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node not in self.names:
                self._take(node, self.graph.placeholder(node.name), str(node.name))
            elif node.op == "call_function":
                self._call(node)
        last = next(iter(self.program.graph.find_nodes(op="output")))
        self.graph.output(self.new[_chosen(self.model, self.program, last, output)])
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        traced = fx.GraphModule(self.root, self.graph, class_name=type(self.model).__name__)
        for name, module in traced.named_modules():
            same = next((m for path, m in self.model.named_modules() if safe_path(path) == name), self.model)
            module.training = same.training
        return traced

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _take(self, node: fx.Node, new: fx.Node, label: str) -> None:
        shape = tuple(size if isinstance(size, int) else None for size in tensor_shape(node))
        kind = str(getattr(node.meta.get("val"), "dtype", torch.float32)).removeprefix("torch.")
        new.meta[ORIGIN] = Origin(label, *scope(node), shape, kind)
        self.new[node] = new

    def _argument(self, value: Any) -> Any:
        return fx.node.map_arg(value, self._node)

    def _node(self, node: fx.Node) -> fx.Node:
        """The new node of an old one; parameters and buffers get theirs when they are first used."""
        if node not in self.new:
            name = self.names[node]
            path = safe_path(name)
            if isinstance(self.modules.get(name.rpartition(".")[0]), _MODULES):
                path += "_"  # the module that stands there may have another tensor of this name, or none
            parent, _, leaf = path.rpartition(".")
            holder = self._container(parent)
            if not hasattr(holder, leaf):
                self._register(holder, leaf, self._copy(name))
            self._take(node, self.graph.get_attr(path), name)
        found: fx.Node = self.new[node]
        return found

    def _call(self, node: fx.Node) -> None:
        name, options = name_of(node), bound(node)
        if name.startswith(_IGNORED):
            return
        if is_random(node):
            raise self._refuse(node, f"draws random numbers in eval mode ({name}); let it do so in training alone")
        if name in LAYERS and node in self.varying and options["weight"] not in self.varying:
            self._layer(node, name, options)
        elif name in NORMS and node in self.varying:
            self._batch_norm(node, options)
        elif name in DROPOUTS or name == "dropped":
            path, kind = scope(node)
            where = (
                path
                if kind.startswith("torch.nn.modules.dropout")
                else f"functional_{node.name.replace('dropped', 'dropout')}"
            )
            which = options["kind"] if name == "dropped" else name
            self._module(node, where, (_DROPOUTS[which], float(options.get("p", 0.5))), lambda make, p: make(p))
        elif name == "by_chance":
            where = str(node.args[1])
            self._module(node, where, (where,), lambda path: copy.deepcopy(self.model.get_submodule(path)))
        elif node in self.fixed:
            name = f"constant_{len(self.graph.find_nodes(op='get_attr'))}_{node.name}"
            self._register(self.root, name, self._evaluate(node).detach().clone())
            self._take(node, self.graph.get_attr(name), label_of(node))
        elif _is_nothing(node):
            self.new[node] = self._node(cast(fx.Node, node.args[0]))
        elif name in WRITES:
            self._write(node, name, options)
        elif name in FILLS:
            self._fill(node, name, options)
        elif node not in self.new:
            self._function(node)

    def _fill(self, node: fx.Node, name: str, options: Mapping[str, Any]) -> None:
        """One number in the shape of a tensor: a constant."""
        number = options.get("fill_value", {"zeros": 0.0, "ones": 1.0}.get(name.split("_")[0], 0.0))
        alone = all(is_pointwise(user.target) for user in node.users)  # they spread it by themselves
        shape = tuple(size if isinstance(size, int) else 1 for size in tensor_shape(node))
        constant = torch.full(() if alone else shape, number, dtype=node.meta["val"].dtype)
        attribute = f"constant_{node.name}"
        self.root.register_buffer(attribute, constant)
        found = self.graph.get_attr(attribute)
        if not alone and shape != tensor_shape(node):
            like = options.get("size") is None  # zeros_like and its kind
            sizes = [
                size
                if isinstance(size, int)
                else self.graph.call_function(aten.sym_size.int, (self._node(options["self"]), dim))
                if like
                else self._argument(options["size"][dim])
                for dim, size in enumerate(tensor_shape(node))
            ]
            self._take(node, found, label_of(node))
            found = self.graph.call_function(aten.expand.default, (found, sizes))
        self._take(node, found, label_of(node))

    def _write(self, node: fx.Node, name: str, options: Mapping[str, Any]) -> None:
        """What is left of an assignment to a part of a tensor: the parts before and after it, and what was assigned."""
        source, whole = options["src"], options["self"]
        if name == "copy":
            if tensor_shape(source) != tensor_shape(whole):
                raise self._refuse(node, "assigns a tensor of another shape in place; write it as an expression")
            self.new[node] = self._node(source)
            return
        dim, size = options["dim"] % len(tensor_shape(whole)), tensor_shape(whole)[options["dim"]]
        start, end, step = options.get("start") or 0, options.get("end"), options.get("step", 1)
        part = self._node(source)
        if name == "select_scatter":
            start, end, step = options["index"], None, 1
            part = self.graph.call_function(aten.unsqueeze.default, (part, dim))
            self._take(source, part, label_of(node))
        if not isinstance(size, int):  # the batch: all of it
            self.new[node] = part
            return
        start = start + size if start < 0 else start
        end = (
            start + 1
            if name == "select_scatter"
            else size
            if end is None
            else end + size
            if end < 0
            else min(end, size)
        )
        if step != 1 or not isinstance(start, int) or not isinstance(end, int):
            raise self._refuse(node, "assigns to every other element in place; write it as an expression")
        pieces = []
        for first, last in ((0, start), (end, size)):
            if first < last:
                piece = self.graph.call_function(aten.slice.Tensor, (self._node(whole), dim, first, last))
                piece.meta[ORIGIN] = Origin(
                    f"{label_of(node)}.slice", *scope(node), _with(tensor_shape(whole), dim, last - first)
                )
                pieces.append(piece)
            if first == 0:
                pieces.append(part)
        joined = part if len(pieces) == 1 else self.graph.call_function(aten.cat.default, (pieces, dim))
        if len(pieces) == 1:
            self.new[node] = part
        else:
            self._take(node, joined, label_of(node))

    def _softmax_of_two(self, node: fx.Node, dim: int) -> None:
        """As the logistic function of the difference, which has an integer meaning."""
        source, half = self._node(cast(fx.Node, node.args[0])), _with(tensor_shape(node), dim, 1)
        first, second = (
            self._step(node, "slice", aten.slice.Tensor, (source, dim, place, place + 1), half) for place in (0, 1)
        )
        difference = self._step(node, "sub", aten.sub.Tensor, (first, second), half)
        one = self._step(node, "sigmoid", aten.sigmoid.default, (difference,), half)
        other = self._step(node, "rsub", aten.rsub.Scalar, (one, 1.0), half)
        self._take(node, self.graph.call_function(aten.cat.default, ([one, other], dim)), label_of(node))

    def _clamp(self, node: fx.Node) -> bool:
        """Limits that are tensors of one number, as numbers."""
        options, limits = bound(node), []
        for limit in (options["min"], options["max"]):
            if isinstance(limit, fx.Node) and (limit in self.varying or limit.meta["val"].numel() != 1):
                return False
            number = None if limit is None else float(self._evaluate(limit))
            limits.append(None if number is None or math.isinf(number) else number)
        if limits == [None, None]:
            self.new[node] = self._node(options["self"])
        else:
            call = self.graph.call_function(aten.clamp.default, (self._node(options["self"]), *limits))
            self._take(node, call, label_of(node))
        return True

    def _extreme(self, node: fx.Node, is_max: bool) -> None:
        """The larger of two tensors as one of them and how much the other is above it; the smaller likewise."""
        first, second = self._argument(tuple(bound(node).values()))
        shape = _with(tensor_shape(node), 1, cast(int, tensor_shape(node)[1]))
        above = self._step(node, "sub", aten.sub.Tensor, (second, first) if is_max else (first, second), shape)
        more = self._step(node, "relu", aten.relu.default, (above,), shape)
        target = aten.add.Tensor if is_max else aten.sub.Tensor
        self._take(node, self.graph.call_function(target, (first, more)), label_of(node))

    def _fold(self, node: fx.Node) -> None:
        """Sums of overlapping blocks: a transposed convolution whose kernel puts each value into its place."""
        options = bound(node)
        source, size, kernel = (options[key] for key in ("self", "output_size", "kernel_size"))
        window = {key: options[key] for key in ("dilation", "padding", "stride")}
        spans = [
            (full + 2 * padding - dilation * (side - 1) - 1, stride)
            for full, side, dilation, padding, stride in zip(size, kernel, *window.values(), strict=True)
        ]
        places, area = [span // stride + 1 for span, stride in spans], math.prod(kernel)
        channels = tensor_shape(node)[1]
        shape = (None, channels * area, *places)
        blocks = self._step(node, "unflatten", aten.unflatten.int, (self._node(source), 2, places), shape)
        weight = torch.eye(area).reshape(area, 1, *kernel).repeat(channels, 1, 1, 1)
        window |= {"groups": channels, "output_padding": [span % stride for span, stride in spans]}
        how = (nn.ConvTranspose2d, weight.to(node.meta["val"].dtype), None, window)
        self._module(node, _path_of_its_own(node), how, make_conv, blocks)

    def _step(
        self, node: fx.Node, name: str, target: Any, args: tuple[Any, ...], shape: tuple[int | None, ...]
    ) -> fx.Node:
        """One of several operators that stand for a recorded one."""
        found = self.graph.call_function(target, args)
        found.meta[ORIGIN] = Origin(f"{label_of(node)}.{name}", *scope(node), shape)
        return found

    def _rewrite(self, node: fx.Node) -> bool:
        """Whether other operators, which have an integer meaning, were taken for one that has none."""
        name, shape = name_of(node), tensor_shape(node)
        if name == "stack":
            dim = bound(node)["dim"] % len(shape)
            parts = [
                self._step(node, "unsqueeze", aten.unsqueeze.default, (self._node(part), dim), _with(shape, dim, 1))
                for part in bound(node)["tensors"]
            ]
            self._take(node, self.graph.call_function(aten.cat.default, (parts, dim)), label_of(node))
            return True
        if name in ("softmax", "_softmax") and bound(node).get("dtype") is None:
            dim = bound(node)["dim"] % len(shape)
            if isinstance(shape[dim], int) and shape[dim] == 2:
                self._softmax_of_two(node, dim)
                return True
        if name == "col2im" and len(shape) == 4:
            self._fold(node)
            return True
        if node.target is aten.clamp.Tensor:
            return self._clamp(node)
        of_two = name in ("maximum", "minimum") or node.target in (aten.max.other, aten.min.other)
        operands = bound(node).values() if of_two and len(shape) > 1 else ()
        if operands and all(isinstance(operand, fx.Node) and operand in self.varying for operand in operands):
            self._extreme(node, name.startswith("max"))
            return True
        return False

    def _function(self, node: fx.Node) -> None:
        if self._rewrite(node):
            return
        target, args, kwargs = node.target, self._argument(node.args), self._argument(node.kwargs)
        source = node.args[0] if node.args else None
        if target is operator.getitem and isinstance(source, fx.Node) and source.target in FIRST_OF:
            if node.args[1] == 0:
                self.new[node] = self.new[source]
            if node.args[1] == 0 or not node.users:
                return
            raise self._refuse(node, f"reads the indices that {name_of(source)} returns, which have no meaning here")
        target = _LENIENT.get(target, FIRST_OF.get(target, target))
        if target is aten.rrelu.default:  # in eval mode
            lower, upper = (bound(node)[key] for key in ("lower", "upper"))
            target, args, kwargs = aten.leaky_relu.default, (args[0], (lower + upper) / 2), {}
        label = label_of(node)
        name = label if label == scope(node)[0] else name_of(node).removesuffix("_")
        new = self.graph.create_node("call_function", cast(Any, target), args, kwargs, name=name.replace(".", "_"))
        self._take(node, new, label)

    # -- modules ----------------------------------------------------------------------------------------------------

    def _module(
        self,
        node: fx.Node,
        name: str,
        how: tuple[Any, ...],
        make: Callable[..., nn.Module],
        source: fx.Node | None = None,
    ) -> None:
        """Call the module ``make(*how)`` at the path ``name``; ``source`` stands for the first argument of ``node``."""
        path = safe_path(name)
        if path in self.made:
            if not _equal(self.made[path], how):
                raise self._refuse(node, f"calls layer {name!r} in two ways; give each call a layer of its own")
        else:
            self.made[path] = how
            self._install(path, make(*how))
        source = self._node(cast(fx.Node, node.args[0])) if source is None else source
        call = self.graph.create_node("call_module", path, (source,), name=name.replace(".", "_"))
        self._take(node, call, name)

    def _layer(self, node: fx.Node, operator: str, options: Mapping[str, Any]) -> None:
        name = self._owner(node, options["weight"])
        weight, bias = (self._parameter(options[key], node) for key in ("weight", "bias"))
        if operator == "linear":
            self._module(node, name, (weight, bias), make_linear)
            return
        window = {key: options.get(key) for key in ("stride", "padding", "dilation", "groups", "output_padding")}
        self._module(node, name, (_CONVS[operator], weight, bias, window), make_conv)

    def _owner(self, node: fx.Node, weight: fx.Node) -> str:
        """The layer whose weight it is; a name like that of the weight where no module is such a layer."""
        found = self.names.get(weight, "")
        owner, _, leaf = found.rpartition(".")
        around = (self.first.get(path, path) for path, _ in reversed(scopes(node)))
        inside = next((path for path in around if path in self.layers), None)
        if leaf == "weight" and owner in self.layers:
            shared = inside is not None and self.model.get_submodule(inside).weight is self.tensors[found]
            return cast(str, inside) if shared else owner
        return inside or (f"{found}_{name_of(node)}" if found else _path_of_its_own(node))

    def _batch_norm(self, node: fx.Node, options: Mapping[str, Any]) -> None:
        path, mean = scope(node)[0], options["running_mean"]
        if options.get("training") or mean is None:
            raise self._refuse(
                node, "normalises by the statistics of the batch in eval mode, too; use track_running_stats=True"
            )
        name = self.names.get(mean, "").rpartition(".")[0] or self.first.get(path, path)
        source = self.modules.get(name)
        is_own = isinstance(source, nn.modules.batchnorm._BatchNorm)
        counter = getattr(source, "num_batches_tracked", None)
        tensors = [self._parameter(options[key], node) for key in ("weight", "bias", "running_mean", "running_var")]
        frozen = not is_own or is_frozen(cast(nn.Module, source))
        momentum = source.momentum if is_own else options["momentum"]  # type: ignore[union-attr]
        dims = len(tensor_shape(cast(fx.Node, node.args[0])))
        make = nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d
        self._module(node, name, (make, *tensors, counter, momentum, options["eps"], frozen), make_batch_norm)
        if name_of(node) != "batch_norm":  # its output is a tuple, of which the first is read
            self.new |= dict.fromkeys(node.users, self.new[node])

    def _parameter(self, value: Any, node: fx.Node) -> torch.Tensor | None:
        """A layer's own parameter (a copy), or a new one with the value that the network computes for it."""
        if value is None:
            return None
        if value in self.names:
            return self._copy(self.names[value])
        if value in self.varying:
            raise self._refuse(node, "computes a layer's parameters from the input; such layers stay float")
        return nn.Parameter(self._evaluate(value).detach().clone())

    def _evaluate(self, node: fx.Node) -> Any:
        """What a node that depends on parameters alone computes."""
        if node in self.names:
            return self.tensors[self.names[node]]
        if node not in self.evaluated:
            args, kwargs = (fx.node.map_arg(given, self._evaluate) for given in (node.args, dict(node.kwargs)))
            with torch.no_grad():
                self.evaluated[node] = cast(Any, node.target)(*cast(Any, args), **cast(Any, kwargs))
        return self.evaluated[node]

    def _copy(self, name: str) -> torch.Tensor:
        """A copy of a parameter or buffer; one for all names of one tensor."""
        tensor = self.tensors[name]
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = copy.deepcopy(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                self.copies[id(tensor)] = nn.Parameter(self.copies[id(tensor)], tensor.requires_grad)
        return self.copies[id(tensor)]

    def _container(self, path: str) -> nn.Module:
        found = self.root
        for part in path.split(".") if path else ():
            if part not in found._modules:
                found.add_module(part, nn.Module())
            found = cast(nn.Module, found._modules[part])
        return found

    def _install(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        holder = self._container(parent)
        old = holder._modules.get(leaf)
        if old is not None:  # something inside it was used before it
            for name, child in old._modules.items():
                module.add_module(name, child)
            for name, tensor in (*old._parameters.items(), *old._buffers.items()):
                if name not in (*module._parameters, *module._buffers):
                    self._register(module, name, cast(torch.Tensor, tensor))
        holder.add_module(leaf, module)

    @staticmethod
    def _register(holder: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor)

    def _refuse(self, node: fx.Node, reason: str) -> UnsupportedModelError:
        path, kind = scope(node)
        where = (
            f"module {path!r} ({kind.rpartition('.')[2]})" if path else f"the forward of {type(self.model).__name__}"
        )
        return UnsupportedModelError(f"{where} {reason}")


def _path_of_its_own(node: fx.Node) -> str:
    """For a layer that no module of the network is."""
    return label_of(node).replace(name_of(node), node.name)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b or (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _is_nothing(node: fx.Node) -> bool:
    """Whether an operator hands on the tensor that it reads."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value, before = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor) or value.dtype != before.dtype:
        return False
    return KINDS.get(name_of(node)) == "identity"


def _chosen(model: nn.Module, program: ExportedProgram, last: fx.Node, output: str | int | None) -> fx.Node:
    """Which tensor the network is to return."""
    mutated = sum(spec.kind.name.endswith("MUTATION") for spec in program.graph_signature.output_specs)
    leaves = list(cast(Sequence[Any], last.args[0]))[mutated:]
    found: Any = _pytree.tree_unflatten(leaves, cast(Any, program.call_spec.out_spec))
    return chosen(found, output, type(model).__name__, fx.Node)


def chosen(returned: Any, output: str | int | None, network: str, kind: type[Output]) -> Output:
    """The output that is wanted of what a network returned.

    Args:
        returned: a tensor, or a tuple, list, mapping or object that holds some.
        output: a key, attribute or number; None: there is one tensor.
        network: its name, for messages.
        kind: of what stands for a tensor.

    Raises:
        UnsupportedModelError: there are several, and none is chosen.
        ConfigError: there is none of that name.
    """
    if isinstance(returned, kind):
        if output is None:
            return returned
        raise ConfigError(f"output={output!r}, but {network} returns one tensor; leave output away")
    if isinstance(returned, Mapping):
        named = dict(returned)
    else:
        named = (
            dict(enumerate(returned)) if isinstance(returned, tuple | list) else dict(getattr(returned, "__dict__", {}))
        )
    tensors = {key: value for key, value in named.items() if isinstance(value, kind)}
    if output in tensors:
        return tensors[output]
    text = f"{network} returns a {type(returned).__name__} of {len(named)}"
    if output is None:
        raise UnsupportedModelError(
            f"{text}, but one tensor is wanted: choose it by output=, one of {list(tensors)}, or let forward return it "
            "alone"
        )
    raise ConfigError(f"output={output!r}, but {text}: choose one of {list(tensors)}")


def _with(shape: tuple[Any, ...], dim: int, size: int) -> tuple[int | None, ...]:
    """A shape with another size in one dimension; None stands for what depends on the batch."""
    sizes = [size if place == dim else found for place, found in enumerate(shape)]
    return tuple(found if isinstance(found, int) else None for found in sizes)


def safe_path(path: str) -> str:
    """A module path that a graph module can hold: names that it or Python has taken get an underscore."""
    parts = [f"{part}_" if keyword.iskeyword(part) else part for part in path.split(".")]
    while parts[0] in _TAKEN:
        parts[0] += "_"
    return ".".join(parts)
