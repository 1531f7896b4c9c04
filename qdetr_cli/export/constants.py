"""The values in a program that depend on no input, computed in the order of its graph.

The order matters where tensors are written in place, as DAB-DETR does to what becomes its first queries: a
value that was read by its place in the graph alone would lack what is written to it, or to a view of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx


class Constants:
    """The tensors of the nodes that depend on no input; `owned` are those of placeholders that are known."""

    def __init__(self, graph: fx.Graph, owned: Mapping[fx.Node, Tensor]) -> None:
        self._roots = _roots(graph)
        self._open = _open(graph, owned, self._roots)
        written = {root for node in graph.nodes for root in _written(node, self._roots)}
        self._known: dict[fx.Node, Any] = {
            node: tensor.clone() if node in written else tensor for node, tensor in owned.items()
        }
        for node in graph.nodes:
            if node.op == "call_function" and node not in self._open:
                self._known[node] = node.target(
                    *fx.map_arg(node.args, self._known.__getitem__),
                    **fx.map_arg(node.kwargs, self._known.__getitem__),
                )

    def has(self, value: Any) -> bool:
        """Whether a value depends on no input."""
        return value not in self._open if isinstance(value, fx.Node) else True

    def __call__(self, value: Any) -> Any:
        """The tensor of a node; what is no node as it is."""
        return self._known[value] if isinstance(value, fx.Node) else value


Roots = dict[fx.Node, fx.Node]


def _roots(graph: fx.Graph) -> Roots:
    """For each node the one whose memory it shows: itself, but for views and for writing in place."""
    roots: Roots = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        shown = [each for each in (schema.returns if schema else ()) if each.alias_info is not None]
        first = next(iter(node.all_input_nodes), None)
        roots[node] = roots[first] if shown and first is not None else node
    return roots


def _open(graph: fx.Graph, owned: Mapping[fx.Node, Tensor], roots: Roots) -> set[fx.Node]:
    """The nodes that depend on an input, or show memory into which what does is written at any time."""
    found = {node for node in graph.nodes if node.op != "call_function" and node not in owned}
    while True:
        size = len(found)
        for node in graph.nodes:
            if roots[node] in found or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
                found.update(_written(node, roots))
        if len(found) == size:
            return found


def _written(node: fx.Node, roots: Roots) -> Iterator[fx.Node]:
    """The memory that a node writes to."""
    schema = getattr(node.target, "_schema", None)
    for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, fx.Node):
            yield roots[value]
