"""Dense attention as fx graphs: how it is called, what a call computes, and where its quantizers go.

Each attention module is exported alone, once for each way the model calls it, batch and token counts free.
Its graph calls the module's children by name, so that a quantized Linear takes effect, and has live dropout.
"""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qdetr_cli.attention import Arguments, Captured, Signature, bind, signature_of
from qdetr_cli.trace import PRODUCTS, SOFTMAX

Calls = dict[Signature, Arguments]
Graphs = dict[Signature, fx.Graph]

aten = torch.ops.aten
_CHECKS = (
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_SIZE = (128, 160)  # pixels of the recorded calls: a few tokens at stride 32, none of the counts equal


def capture_all(model: nn.Module, paths: Collection[str]) -> dict[str, Graphs]:
    """The graphs of each dense attention module, by module path. Modules that are built alike share them."""
    shared: dict[Any, fx.Graph] = {}
    found: dict[str, Graphs] = {path: {} for path in paths}
    for path, calls in record_calls(model, paths).items():
        attention = model.get_submodule(path)
        for signature, arguments in calls.items():
            build = (signature, _build(attention), _broadcast_sides(arguments))
            if build not in shared:
                shared[build] = capture(attention, arguments)
            found[path][signature] = shared[build]
    return found


def _build(module: nn.Module) -> tuple[Any, ...]:
    """All that its code may have written into a graph: class, children, plain attributes."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    return type(module), repr(module), tuple(sorted(plain.items()))


def _broadcast_sides(arguments: Arguments) -> tuple[tuple[int, int], ...]:
    """Which sides of which arguments are 1, and so are fixed in a graph."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return tuple((i, axis) for i, x in enumerate(tensors) for axis, side in enumerate(x.shape) if side == 1)


@torch.no_grad()
def record_calls(model: nn.Module, paths: Collection[str]) -> dict[str, Calls]:
    """How the model calls each of these modules: in eval mode, with padding, and in training with labels.

    The model is left as it was, and so is the random state. Transformers drops a mask of ones (but keeps it
    while it is traced), so there must be real padding.
    """
    calls: dict[str, Calls] = {path: {} for path in paths}
    if not paths:
        return calls
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(_record, calls[path]), with_kwargs=True)
        for path in paths
    ]
    try:
        with _undisturbed(model), torch.random.fork_rng():
            _run_all_ways(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _record(calls: Calls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = bind(module.forward, args, kwargs)
    calls.setdefault(signature_of(arguments), arguments)


def _run_all_ways(model: nn.Module) -> None:
    base: Any = model.base_model  # heads and loss are left out: no attention there
    height, width = getattr(model.config, "anchor_image_size", None) or _SIZE  # some anchors fix the size
    pixels = next(model.parameters()).new_ones(2, 3, height, width).uniform_()
    mask = torch.ones_like(pixels[:, 0], dtype=torch.int64)  # (B, H, W), 1 = valid
    mask[1, height // 2 :] = 0
    target = {"class_labels": mask.new_zeros(1), "boxes": pixels.new_full((1, 4), 0.5)}
    denoised = {"labels": [target, target]} if "labels" in inspect.signature(base.forward).parameters else {}
    base.eval()
    base(pixel_values=pixels)
    base(pixel_values=pixels, pixel_mask=mask)
    for module in base.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)  # statistics stay
    base(pixel_values=pixels, pixel_mask=mask, **denoised)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Give every module its mode back at the end."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def capture(attention: nn.Module, arguments: Arguments) -> fx.Graph:
    """The graph of one call, without quantizers: inputs are the tensor arguments, by name."""
    program = _export(attention, arguments)
    specs = program.graph_signature.input_specs
    given = [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]
    inputs = dict(zip(given, arguments.items(), strict=True))
    owned = {spec.arg.name: spec.target for spec in specs if spec.target is not None}  # parameters, buffers
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            results = [new.get(each, each) for each in node.args[0]]
            graph.output(pytree.tree_unflatten(results, program.call_spec.out_spec))
        elif node.op == "placeholder":
            new[node] = _source(graph, node, inputs, owned)
        elif node.target not in _CHECKS:
            new[node] = _operation(graph, node, new, owned)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "call_module" and node.is_impure())
    return graph


def _export(attention: nn.Module, arguments: Arguments) -> ExportedProgram:
    """The exported call, in train mode: only there does the graph know the probability of dropout."""
    free = {name: _free_sides(value) for name, value in arguments.items()}
    inputs = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with _undisturbed(attention):
        return torch.export.export(attention.train(), (), inputs, dynamic_shapes=free, strict=False)


def _free_sides(value: Any) -> Any:
    """Which sides of an argument stay free: all but those of 1. Export finds out which the weights fix."""
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis, side in enumerate(value.shape) if side > 1}


def _source(graph: fx.Graph, node: fx.Node, inputs: dict[str, Any], owned: dict[str, str]) -> Any:
    """What stands for an input of the exported program: an input, a constant, a parameter or buffer."""
    if node.name in owned:
        return graph.get_attr(owned[node.name])
    name, value = inputs[node.name]
    return _like(graph.placeholder(name), node) if isinstance(value, Tensor) else value


def _operation(graph: fx.Graph, node: fx.Node, new: dict[fx.Node, Any], owned: dict[str, str]) -> fx.Node:
    """The node of one operation; a linear on a child's weight becomes a call of the child."""
    x, *others = node.args
    if node.target is aten.linear.default and str(others[0]) in owned:
        child = owned[str(others[0])].removesuffix(".weight")
        return _like(graph.call_module(child, (new[_node(x)],)), node)
    if node.target is aten.dropout.default:
        training = graph.create_node("get_attr", "training")
        return _like(graph.call_function(F.dropout, (new[_node(x)], others[0], training)), node)
    return graph.node_copy(node, new.__getitem__)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _like(made: fx.Node, node: fx.Node) -> fx.Node:
    made.meta["val"] = node.meta["val"]
    return made


def with_quantizers(
    graph: fx.Graph, slots: Iterable[str], heads: int, aligned: Collection[str] = ()
) -> fx.Graph:
    """A copy of a captured graph that calls `<slot>_quantizer` for each of the slots q, k, probs, v.

    For the slots in `aligned` it calls `<slot>_alignment` first. Both see (B, N, .., ..), heads on axis 1,
    and never a mask: it is added between product and softmax.
    """
    graph = copy.deepcopy(graph)
    (softmax,) = [node for node in graph.nodes if node.target is SOFTMAX]
    scores = _nearest_product(softmax, lambda node: node.all_input_nodes)
    mixed = _nearest_product(softmax, lambda node: node.users)
    assert softmax in _first_inputs(_node(mixed.args[0])), "softmax is not the left operand of its product"
    operands = {"q": (scores, 0), "k": (scores, 1), "v": (mixed, 1)}
    for slot in slots:
        if slot == "probs":
            uses = list(softmax.users)
            quantized = _through(graph, softmax, [f"{slot}_quantizer"], heads)
            for user in uses:
                user.replace_input_with(softmax, quantized)
        else:
            product, index = operands[slot]
            children = [f"{slot}_alignment"] * (slot in aligned) + [f"{slot}_quantizer"]
            product.update_arg(index, _through(graph, _node(product.args[index]), children, heads))
    return graph


def _through(graph: fx.Graph, node: fx.Node, children: Iterable[str], heads: int) -> fx.Node:
    """The value of `node` after these children, which see (B, N, .., ..): (B * N, .., ..) is unfolded."""
    unfolded = next(each for each in _first_inputs(node) if _rank(each) == 4)  # itself, or upstream
    assert unfolded.meta["val"].shape[1] == heads, f"{node}: heads are not on axis 1, not even upstream"
    with graph.inserting_before(node.next):
        value = node
        if unfolded is not node:
            value = graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
        for child in children:
            value = graph.call_module(child, (value,))
        if unfolded is not node:
            value = graph.call_function(aten.flatten.using_ints, (value, 0, 1))
        return value


def _nearest_product(start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> fx.Node:
    """The first matmul or bmm on the way from `start`, breadth first."""
    queue = deque(neighbours(start))
    while queue:
        node = queue.popleft()
        if node.target in PRODUCTS:
            return node
        queue.extend(neighbours(node))
    raise AssertionError(f"{start} has no product on one side")


def _first_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """A node, its first input, that one's first input, and so on."""
    yield node
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape) if "val" in node.meta else 0


def compiled(graph: fx.Graph, attention: nn.Module) -> Captured:
    """The graph with its code, for a module that has all the children that the graph calls."""
    for node in graph.nodes:
        node.meta.clear()
    module = fx.GraphModule(attention, copy.deepcopy(graph))
    return Captured(graph, type(module).forward)
