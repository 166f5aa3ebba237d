"""What a compiled layer saves around the operators of `axolotl.kernels.lora_ops`: a pass of the compiler over forward and backward.

The gradient of A needs the input of the projections, `x = w * (h * r)` behind an RMSNorm with one factor `r` a token. Backward
would form x again only for it, a pass over h and one more over x:

    grad_low^T x = ((grad_low * r)^T h) * w

A residual is added by the operator at the end of an attention or of an MLP, which has to write its output once more anyway for
the low-rank term, instead of by a pass over both:

    lora_project(..., residual),   lora_down(..., residual)

The pass changes a graph where all of this is in sight, and leaves alone what it does not know. It comes before the compiler
decides what backward keeps.

Shape legend: N tokens, H features, O features out.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

import axolotl.kernels.lora_ops  # noqa: F401  registers the operators

aten, prims, ours = torch.ops.aten, torch.ops.prims, torch.ops.axolotl

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_SIZES = (aten.sym_size.int, aten.sym_numel.default)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)

# Operators that take x second and return the gradient of A second, with the number of their arguments without `row_scale`.
_GRADIENTS: dict[Any, int] = {ours.lora_project_backward.default: 9, ours.lora_project_apart_backward.default: 8}
# Operators whose first output may have a residual added, with the number of their arguments without `residual`.
_SUMS: dict[Any, int] = {ours.lora_project.default: 7, ours.lora_down.default: 11}


class LoraGraph(CustomGraphPass):
    """The pass, for `joint_custom_pre_pass` of inductor's options."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite `graph`, of forward and backward or of forward alone, in place."""
        _read_inputs_of_norms(graph)
        _add_residuals(graph)

    def uuid(self) -> Any:
        """What compiled code in the cache depends on."""
        return get_hash_for_files((__file__,))


LORA_GRAPH = LoraGraph()


# --- the gradient of A from the input of a norm -------------------------------------------------------------------------


class _Norm(NamedTuple):
    """`weight * (hidden * scale)`, up to casts: (H,), (..., H) in the dtype of the operator's x, and fp32 (..., 1)."""

    weight: fx.Node
    hidden: fx.Node
    scale: fx.Node


def _read_inputs_of_norms(graph: fx.Graph) -> None:
    calls = [node for node in graph.nodes if node.target in _GRADIENTS]
    if not calls:
        return
    backward = _backward_of(graph)
    for output in dict.fromkeys(_source(call.args[1]) for call in calls):
        readers = _readers(output, backward)
        norms = {_match_norm(output, call) for call in readers}
        if len(norms) == 1 and (norm := norms.pop()) is not None:
            for call in readers:
                _read_input(graph, call, norm)


def _backward_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs of forward do not need.

    Those are the outputs that depend on no gradient of an output, whose placeholders the compiler knows by their name, too.
    """
    differentiated: set[fx.Node] = set()
    for node in graph.nodes:
        is_gradient = node.op == "placeholder" and "tangents" in str(node.target)
        if is_gradient or not differentiated.isdisjoint(node.all_input_nodes):
            differentiated.add(node)
    needed = set(graph.output_node().all_input_nodes) - differentiated
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return set(graph.nodes) - needed


def _readers(output: fx.Node, backward: set[fx.Node]) -> list[fx.Node]:
    """The calls that read a norm's output as their x; empty where it is formed in backward anyway."""
    if output in backward or output.meta.get("recompute") in _RECOMPUTED:
        return []
    found: list[fx.Node] = []
    forms = [output]
    for form in forms:
        for user in _users(form):
            if user.target in _VIEWS + _CASTS:
                forms.append(user)
            elif user.op == "output" or user.meta.get("recompute") in _RECOMPUTED:
                return []
            elif user in backward:
                is_reader = user.target in _GRADIENTS and [arg for arg in _flat(user) if arg is form] == [user.args[1]]
                if not is_reader:
                    return []
                found.append(user)
    return found


def _match_norm(output: fx.Node, call: fx.Node) -> _Norm | None:
    """What `output`, from which `call` has its x, is the product of."""
    if not _is_plain(call, _GRADIENTS[call.target]):
        return None
    dtype, shape = _val(call.args[1]).dtype, _val(output).shape
    # Scaled by what may be far from 1, a gradient in fp16 would leave its range.
    if dtype is torch.float16 or not _has_rows(call.args[1], shape[-1]):
        return None
    for weight, normed in _factors(output):
        normed = _uncast(normed)
        if _val(weight).dim() != 1 or not _is_shape(weight, shape[-1:]) or not _is_shape(normed, shape):
            continue
        for wide, scale in _factors(normed):
            hidden = wide if _val(wide).dtype == dtype else _uncast(wide)
            shapes = _is_shape(hidden, shape) and _is_shape(scale, (*shape[:-1], 1))
            dtypes = _val(hidden).dtype == dtype and _val(scale).dtype == torch.float32
            if shapes and dtypes and _is_contiguous(hidden) and _is_contiguous(scale):
                return _Norm(weight, hidden, scale)
    return None


def _read_input(graph: fx.Graph, call: fx.Node, norm: _Norm) -> None:
    with graph.inserting_before(call):
        hidden, scale = (_flattened(graph, node, call) for node in norm[1:])
    for node in (hidden, scale):
        if node not in norm:
            # Else a view may be kept where it is one of an input of the graph.
            node.meta["partitioner_tag"] = "must_be_in_backward"
    _set_args(call, (call.args[0], hidden, *call.args[2:], scale))
    for grad_a in [user for user in call.users if user.target is operator.getitem and user.args[1] == 1]:
        with graph.inserting_after(grad_a):
            whole = product = _new(graph, aten.mul.Tensor, (grad_a, norm.weight), grad_a)
        if _val(product).dtype != _val(grad_a).dtype:
            with graph.inserting_after(product):
                cast = prims.convert_element_type.default
                whole = _new(graph, cast, (product, _val(grad_a).dtype), grad_a)
        grad_a.replace_all_uses_with(whole, delete_user_cb=lambda user, own=product: user is not own)


# --- residuals --------------------------------------------------------------------------------------------------------


def _add_residuals(graph: fx.Graph) -> None:
    place = {node: at for at, node in enumerate(graph.nodes)}
    for call in [node for node in place if node.target in _SUMS and _is_plain(node, _SUMS[node.target])]:
        outputs = [user for user in call.users if user.target is operator.getitem and user.args[1] == 0]
        if len(outputs) != 1:
            continue
        forms = outputs
        while len(users := _users(forms[-1])) == 1 and users[0].target in _VIEWS:
            forms.append(users[0])
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
            continue
        total = users[0]
        residual = next((arg for arg in total.args if arg is not forms[-1]), None)
        if not isinstance(residual, fx.Node) or place[residual] > place[call] or not _can_add(residual, forms, total):
            continue
        with graph.inserting_before(call):
            _set_args(call, (*call.args, _flattened(graph, residual, call)))
        for node in (call, *call.users, *forms[1:]):
            _evaluate(node)
        total.replace_all_uses_with(forms[-1])
        graph.erase_node(total)


def _can_add(residual: fx.Node, forms: list[fx.Node], total: fx.Node) -> bool:
    """Whether the operator can add `residual` to its output, whose `forms` are that output and views of it."""
    if any(_val(node).dtype != _val(total).dtype for node in (residual, forms[0])) or not _is_contiguous(residual):
        return False
    shape = _val(total).shape
    return _has_rows(forms[0], shape[-1]) and _is_shape(residual, shape) and _is_shape(forms[-1], shape)


# --- nodes --------------------------------------------------------------------------------------------------------------


def _is_plain(node: fx.Node, count: int) -> bool:
    """Whether a node has `count` arguments and no others, and they can be evaluated."""
    return not node.kwargs and len(node.args) == count and all("val" in arg.meta for arg in node.all_input_nodes)


def _val(node: Any) -> torch.Tensor:
    """The tensor without data that stands for what a node computes; an empty one for what is no tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else torch.empty(0)


def _users(node: fx.Node) -> list[fx.Node]:
    """What reads the elements of a tensor, not its size."""
    return [user for user in node.users if user.target not in _SIZES]


def _flat(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, each as often as it is there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _uncast(node: fx.Node) -> fx.Node:
    """What a cast from one floating dtype to another casts, else the node."""
    source = node.args[0] if node.target in _CASTS and set(node.kwargs) <= {"dtype"} else None
    if isinstance(source, fx.Node) and all(_val(one).dtype in _FLOATS for one in (node, source)):
        return source
    return node


def _source(node: Any) -> fx.Node:
    """What a node shows in another form: through views and casts."""
    while True:
        below = node.args[0] if node.target in _VIEWS else _uncast(node)
        if below is node:
            return node
        node = below


def _factors(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a product, both ways round."""
    if node.target is not aten.mul.Tensor or not all(isinstance(arg, fx.Node) for arg in node.args):
        return []
    one, other = node.args
    return [(one, other), (other, one)]  # pyright: ignore[reportReturnType]


def _is_shape(node: fx.Node, shape: Any) -> bool:
    own = _val(node).shape
    return len(own) == len(shape) and all(statically_known_true(a == b) for a, b in zip(own, shape, strict=True))


def _has_rows(node: Any, columns: Any) -> bool:
    """Whether it is (N, `columns`), the latter one number."""
    shape = _val(node).shape
    return len(shape) == 2 and isinstance(columns, int) and statically_known_true(shape[1] == columns)


def _is_contiguous(node: fx.Node) -> bool:
    """Whether the strides say so for any size that a dimension may have."""
    val, wanted = _val(node), 1
    for size, stride in reversed(list(zip(val.shape, val.stride(), strict=True))):
        if not statically_known_true(size == 1) and not statically_known_true(stride == wanted):
            return False
        wanted = wanted * size
    return True


def _flattened(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """(..., columns) as (N, columns)."""
    return node if _val(node).dim() == 2 else _new(graph, aten.view.default, (node, [-1, _val(node).shape[-1]]), like)


def _new(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A node in the part of the graph, and with the rules for recomputing, of `like`."""
    node = graph.call_function(target, args)
    node.meta = {
        name: value for name, value in like.meta.items() if name not in ("val", "tensor_meta", "eager_input_vals")
    }
    _evaluate(node)
    return node


def _set_args(node: fx.Node, args: tuple[Any, ...]) -> None:
    node.args = args
    if "eager_input_vals" in node.meta:
        node.meta["eager_input_vals"] = map_arg((args, {}), lambda arg: arg.meta["val"])


def _evaluate(node: fx.Node) -> None:
    """Note what the node computes."""
    args: Any = map_arg(node.args, lambda arg: arg.meta["val"])
    with torch.no_grad():
        node.meta["val"] = node.target(*args)  # pyright: ignore[reportCallIssue]
    node.meta.pop("tensor_meta", None)
