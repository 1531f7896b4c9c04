"""What makes the operands of an attention module's products, read from its graphs alone, for tests."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx, nn

PRODUCTS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "conv2d")
OPAQUE = ("scaled_dot_product_attention", "multi_head_attention_forward")
SAMPLERS = ("grid_sampler", "index")
KEPT_VALUES = (  # what leaves values as they are, but for their places and, within float32, their type
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "t"),
    *("permute", "expand", "contiguous", "clone", "alias", "detach", "split", "split_with_sizes", "getitem"),
    *("slice", "select", "dropout", "to"),
)
JOINED = ("stack", "cat", "concat")


def dense_operands(graph: fx.Graph) -> Iterator[tuple[str, ...]]:
    """For each product of a captured graph, what makes its operands: a quantizer, or the culprit."""
    for node in graph.nodes:
        assert name(node) not in OPAQUE, f"{node} hides its products"
        if name(node) in PRODUCTS:
            yield tuple(maker(each) for each in node.all_input_nodes[:2])


def sampled_operands(attention: nn.Module, call: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """(what is multiplied, what makes it) in a deformable attention module, exported alone at one size."""
    args, kwargs = call
    with torch.no_grad():
        graph = torch.export.export(attention, args, kwargs, strict=False).graph
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if owner(node).endswith("_quantizer"):
            continue
        if name(node) in SAMPLERS and any(name(user) in (*KEPT_VALUES, *JOINED) for user in node.users):
            yield "value", maker(inputs[0])
        elif name(node) in ("mul", "einsum", "matmul", "bmm") and any(is_sampled(each) for each in inputs):
            yield "weights", *(maker(each) for each in inputs if not is_sampled(each))


def record_calls(model: nn.Module, paths: list[str], **given: Any) -> dict[str, tuple[Any, ...]]:
    """The arguments with which the model calls each of these modules first, in eval mode."""
    calls: dict[str, tuple[Any, ...]] = {}

    def note(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(path, (args, kwargs))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
        for path in paths
    ]
    with torch.no_grad():
        model.eval()(**given)
    for handle in handles:
        handle.remove()
    return calls


def maker(node: fx.Node) -> str:
    """The quantizer whose output this is, moved around at most; else the operation that made the values."""
    while True:
        if owner(node).endswith("_quantizer"):
            return owner(node)
        if node.op == "call_module":
            return str(node.target)
        if name(node) not in KEPT_VALUES:
            return f"{node.op} {name(node)}"
        node = node.all_input_nodes[0]


def is_sampled(node: fx.Node) -> bool:
    """Whether these are values that were sampled from a map, moved around and joined at most."""
    while name(node) in (*KEPT_VALUES, *JOINED):
        node = node.all_input_nodes[0]
    return name(node) in SAMPLERS


def name(node: fx.Node) -> str:
    """The operation without namespace and overload."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]


def owner(node: fx.Node) -> str:
    """The path of the innermost module that made the node, "" where the graph does not say."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
