"""Dense attention as fx graphs: how it is called, what a call computes, and where its quantizers go.

Each attention module is exported alone, once for each way the model calls it, batch and token counts free.
Its graph calls the module's children by name, so that a quantized Linear takes effect, and has live dropout.
"""

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qdetr_cli.attention import Captured, in_mode, tensors_of
from qdetr_cli.recording import Arguments, Signature, leaves, record_calls, undisturbed
from qdetr_cli.structure import Remembered, structure
from qdetr_cli.trace import PRODUCTS, SOFTMAX

Graphs = dict[Signature, fx.Graph]

aten = torch.ops.aten
_CHECKS = (
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_graphs = Remembered[Graphs](most=256)  # without a weight in them; an export takes a second


def capture_all(model: nn.Module, paths: Collection[str]) -> dict[str, Graphs]:
    """The graphs of each dense attention module, by module path. Modules of equal structure share them."""
    found: dict[str, Graphs] = {path: {} for path in paths}
    for path, calls in record_calls(model, paths).items():
        attention = model.get_submodule(path)
        for signature in dict.fromkeys(signature for signature, _ in calls):
            modes = {mode: calls[signature, mode] for mode in (True, False) if (signature, mode) in calls}
            sides = tuple((mode, _broadcast_sides(arguments)) for mode, arguments in modes.items())
            found[path] |= _graphs.get(
                (signature, sides, structure(attention)), partial(_capture_modes, attention, signature, modes)
            )
    return found


def _capture_modes(attention: nn.Module, signature: Signature, modes: Mapping[bool, Arguments]) -> Graphs:
    """One graph where dropout is all that training changes, as nearly everywhere; else one for each mode.

    `modes` holds the arguments of a call in training (True) and in eval mode (False), or one of the two.
    """
    arguments = next(iter(modes.values()))
    graph = capture(attention, arguments, training=True)
    if _is_true_in_eval(graph, attention, arguments):
        return {signature: graph}
    found = {in_mode(signature, True): graph}
    if False in modes:
        found[in_mode(signature, False)] = capture(attention, modes[False], training=False)
    return found


@torch.no_grad()
def _is_true_in_eval(graph: fx.Graph, attention: nn.Module, arguments: Arguments) -> bool:
    """Whether a graph from training computes what the module computes in eval mode."""
    with undisturbed(attention):
        expected = pytree.tree_leaves(attention.eval()(**arguments))
        found = pytree.tree_leaves(compiled(graph, attention).run(attention, **tensors_of(arguments)))
    return all(
        mine.shape == wanted.shape and torch.allclose(mine, wanted, equal_nan=True)
        for mine, wanted in zip(found, expected, strict=True)
        if isinstance(wanted, Tensor)
    )


def _broadcast_sides(arguments: Arguments) -> tuple[tuple[int, int], ...]:
    """Which sides of which arguments are 1, and so are fixed in a graph."""
    tensors = tensors_of(arguments).values()
    return tuple((i, axis) for i, x in enumerate(tensors) for axis, side in enumerate(x.shape) if side == 1)


def capture(attention: nn.Module, arguments: Arguments, *, training: bool) -> fx.Graph:
    """The graph of one call, without quantizers: inputs are the tensor arguments, by name.

    Only in training does the graph know the probability of dropout; it then takes its mode as it runs.
    """
    program = _export(attention, arguments, training)
    specs = program.graph_signature.input_specs
    given = [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]
    inputs = dict(zip(given, leaves(arguments).items(), strict=True))
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


def _export(attention: nn.Module, arguments: Arguments, training: bool) -> ExportedProgram:
    groups = getattr(getattr(attention, "config", None), "group_detr", 1) if training else 1
    free = pytree.tree_map(partial(_free_sides, groups=groups), arguments)
    inputs = pytree.tree_map(
        lambda each: each.detach().clone() if isinstance(each, Tensor) else each, arguments
    )
    with undisturbed(attention):
        attention.train(training)
        return torch.export.export(attention, (), inputs, dynamic_shapes=free, strict=False)


def _free_sides(value: Any, groups: int) -> Any:
    """Which sides of an argument stay free: all but those of 1. Export finds out which the weights fix.

    Group-DETR's attention splits the queries of axis 1 in groups of one size.
    """
    if not isinstance(value, Tensor):
        return None
    free = {axis: Dim.AUTO for axis, side in enumerate(value.shape) if side > 1}
    return free | {1: groups * Dim("queries")} if groups > 1 else free


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


def with_calls(graph: fx.Graph, calls: Mapping[str, Sequence[str]], heads: int) -> fx.Graph:
    """A copy of a captured graph that calls these children, in order, on the slots q, k, probs and v.

    Children see (B, N, .., ..), heads on axis 1, and never a mask: it is added between product and softmax.
    """
    graph = copy.deepcopy(graph)
    (softmax,) = [node for node in graph.nodes if node.target is SOFTMAX]
    scores = _nearest_product(softmax, lambda node: node.all_input_nodes)
    mixed = _nearest_product(softmax, lambda node: node.users)
    assert softmax in _first_inputs(_node(mixed.args[0])), "softmax is not the left operand of its product"
    operands = {"q": (scores, 0), "k": (scores, 1), "v": (mixed, 1)}
    for slot, children in calls.items():
        if not children:
            continue
        if slot == "probs":
            uses = list(softmax.users)
            quantized = _through(graph, softmax, children, heads)
            for user in uses:
                user.replace_input_with(softmax, quantized)
        else:
            product, index = operands[slot]
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
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        node.meta.clear()
    module = fx.GraphModule(attention, copy.deepcopy(graph))
    return Captured(graph, type(module).forward)
