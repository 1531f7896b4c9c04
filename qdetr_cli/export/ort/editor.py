"""Reading and writing an ONNX graph: constants, attributes, shapes, and new nodes before old ones."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]
KIND = "qdetr.kind"  # metadata of a node: what it stands for, where its operator does not say it
Dims = Sequence[Any] | ir.Shape  # of ints, and of symbols where a dimension is free
SIGNED, UNSIGNED = np.dtype(np.int8), np.dtype(np.uint8)
MIDDLE = 128  # the code of 0 of unsigned weights
LAST = (0, 2, 3, 1)  # from channels first to channels last
FIRST = (0, 3, 1, 2)


class Editor:
    """Makes nodes and constants of one graph; equal constants are stored once.

    `weights` is the type of the second operand of products, int8 or uint8: see `prepare`.
    """

    def __init__(self, graph: ir.Graph, weights: np.dtype[Any] = SIGNED) -> None:
        self.graph = graph
        self.weights = weights
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def constant(self, array: Array, name: str) -> ir.Value:
        """An initializer with these numbers, named `name` or as near to it as is free."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.own(array, name)
        return self._constants[key]

    def own(self, array: Array, name: str) -> ir.Value:
        """A new initializer, even where an equal one exists."""
        free, count = name, 0
        while free in self.graph.initializers:
            count += 1
            free = f"{name}.{count}"
        tensor = ir.tensor(array, name=free)
        value = ir.Value(
            name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def kernel(self, codes: Array, zeros: Shape, name: str) -> tuple[ir.Value, Array]:
        """Weights from their codes, int8, as products read them, and as many zero points."""
        shift = MIDDLE if self.weights == UNSIGNED else 0
        moved = (codes.astype(np.int16) + shift).astype(self.weights)
        return self.constant(moved, name), np.full(zeros, shift, self.weights)

    def operand(self, codes: ir.Value, zero: Array, name: str) -> tuple[ir.Value, Array]:
        """Codes and zero points as products take them beside the weights: those of constants may be int8."""
        known = array_of(codes)
        if self.weights == SIGNED or zero.dtype != SIGNED or known is None:
            return codes, zero
        moved, points = (each.astype(np.int16) + MIDDLE for each in (known, zero))
        return self.constant(moved.astype(np.uint8), name), points.astype(np.uint8)

    def numbers(self, *values: int) -> ir.Value:
        """A constant int64 vector, such as a shape."""
        return self.constant(np.array(values, np.int64), "numbers." + "_".join(str(each) for each in values))

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        *,
        before: ir.Node,
        name: str,
        shape: Dims | None = None,
        dtype: ir.DataType | None = None,
        kind: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> ir.Value:
        """The only output of a new node before another; `kind` is noted in the file under KIND."""
        made = ir.node(
            op,
            inputs,
            {**(attributes or {}), **more},
            name=name,
            metadata_props={KIND: kind} if kind else None,
        )
        self.graph.insert_before(before, made)
        output = made.outputs[0]
        output.shape = None if shape is None else ir.Shape(list(shape))
        output.type = None if dtype is None else ir.TensorType(dtype)
        return output

    def transposed(self, value: ir.Value, order: Sequence[int], *, before: ir.Node, name: str) -> ir.Value:
        """The value with its dimensions in another order."""
        shape = None if value.shape is None else [value.shape[each] for each in order]
        return self.node(
            "Transpose", [value], before=before, name=name, shape=shape, dtype=value.dtype, perm=list(order)
        )


def array_of(value: ir.Value | None) -> Array | None:
    """The numbers of a constant; None for what is computed or absent."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def attributes_of(node: ir.Node, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The attributes of a node as plain values; those of `names` alone, where they are there."""
    wanted = node.attributes if names is None else [each for each in names if each in node.attributes]
    return {name: node.attributes[name].value for name in wanted}


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """One attribute of a node as a plain value."""
    return node.attributes[name].value if name in node.attributes else default


def dims(value: ir.Value) -> list[Any] | None:
    """The dimensions of a value, ints where they are known; None for an unknown rank."""
    return None if value.shape is None else list(value.shape)


def static(sizes: Iterable[Any]) -> bool:
    """Whether all of these dimensions are known."""
    return all(isinstance(each, int) for each in sizes)


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, in the order of their names for a stable result."""
    return sorted(set(value.consumers()), key=lambda node: node.name or "")


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads one value read another, the outputs of the graph too."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def shaped(like: Mapping[int, Any], rank: int) -> list[Any]:
    """A list of `rank` entries, 1 but for those given by their place."""
    return [like.get(place, 1) for place in range(rank)]


def present(value: ir.Value | None) -> ir.Value:
    """An input that its operator always has."""
    assert value is not None
    return value
