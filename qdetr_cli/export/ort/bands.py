"""Large images of real values in bands of rows, each small enough for the cache of a core.

A residual block adds, clips and quantizes real values that the last convolution made. As whole images (26 MB
at 160x160x256) each of these steps reads and writes memory; band after band they stay in the cache, and a
block takes 0.7 of the time. Convolutions of codes make their result in bands that are then joined, and `sink`
moves the joining below what is done to every value alone, down to the codes.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import onnx_ir as ir

from qdetr_cli.export.ort.editor import Editor, array_of, attributes_of, replace

T = TypeVar("T")
Bands = dict[ir.Value, list[ir.Value]]

_MARK = "bands"  # of nodes that split or join bands
_CACHE = 700_000  # bytes of real values in one band
_SINKS = frozenset(
    {
        *("Add", "Sub", "Mul", "Relu", "Sigmoid", "Clip", "Min", "Max", "Identity"),
        "QuantizeLinear",
    }
)


def band_rows(rows: int, per_row: int) -> list[int]:
    """How many of the rows, of so many real numbers each, go into each band; one band where all fit."""
    most = max(1, _CACHE // (4 * per_row))
    if rows * per_row * 4 < 2 * _CACHE:
        return [rows]
    whole, rest = divmod(rows, most)
    return [most] * whole + ([rest] if rest else [])


def split(
    editor: Editor, image: ir.Value, rows: Sequence[int], *, before: ir.Node, name: str
) -> list[ir.Value]:
    """An image (B, h, w, D) as bands."""
    if len(rows) == 1:
        return [image]
    made = ir.node(
        "Split", [image, editor.numbers(*rows)], {"axis": 1}, num_outputs=len(rows), name=f"{name}.split"
    )
    made.meta[_MARK] = True
    editor.graph.insert_before(before, made)
    shape = list(image.shape or ())
    for output, count in zip(made.outputs, rows, strict=True):
        output.type = image.type
        output.shape = ir.Shape([shape[0], count, *shape[2:]]) if shape else None
    return list(made.outputs)


def numbered(bands: Sequence[T]) -> list[tuple[T, str]]:
    """Each band with what tells its name from the others', nothing where it is the only one."""
    return [(band, f".{number}" if len(bands) > 1 else "") for number, band in enumerate(bands)]


def joined(editor: Editor, bands: Sequence[ir.Value], *, before: ir.Node, name: str) -> ir.Value:
    """Bands as one image (B, h, w, D)."""
    if len(bands) == 1:
        return bands[0]
    shapes = [list(band.shape or ()) for band in bands]
    shape = [shapes[0][0], sum(each[1] for each in shapes), *shapes[0][2:]] if all(shapes) else None
    image = editor.node(
        "Concat", bands, before=before, name=f"{name}.concat", shape=shape, dtype=bands[0].dtype, axis=1
    )
    made = image.producer()
    assert made is not None
    made.meta[_MARK] = True
    return image


def sink(editor: Editor) -> None:
    """Let what is done to every value of a joined image alone be done to its bands, and join them after."""
    bands: Bands = {}
    for node in list(editor.graph):
        if node.op_type == "Concat" and _MARK in node.meta:
            bands[node.outputs[0]] = [each for each in node.inputs if each is not None]
        elif node.op_type == "Split" and node.inputs[0] in bands:
            _cancel(node, bands[node.inputs[0]])
        elif node.op_type in _SINKS:
            made = _done_to_bands(editor, node, bands)
            if made:
                whole = joined(editor, made, before=node, name=_parts(node)[0])
                whole.shape, whole.type = node.outputs[0].shape, node.outputs[0].type
                replace(node.outputs[0], whole)
                bands[whole] = made
    editor.graph.sort()


def _done_to_bands(editor: Editor, node: ir.Node, bands: Bands) -> list[ir.Value]:
    """The node for each band of its operands; nothing where they have none, or other bands."""
    first = next((_known(value, bands) for value in node.inputs if _known(value, bands)), [])
    rows = [_rows(band) for band in first]
    columns = [_column(editor, value, rows, bands, node) for value in node.inputs]
    if not first or any(each is None for each in columns):
        return []
    known = [each for each in columns if each is not None]
    return [
        _one(editor, node, [each[number % len(each)] for each in known], number)
        for number in range(len(rows))
    ]


def _known(value: ir.Value | None, bands: Bands) -> list[ir.Value]:
    """The bands of a value, or of the codes that it is dequantized from."""
    if value is None or value in bands:
        return [] if value is None else bands[value]
    node = value.producer()
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return [] if codes is None else bands.get(codes, [])


def _cancel(node: ir.Node, bands: Sequence[ir.Value]) -> None:
    """Leave out a split of joined bands into the same bands."""
    same = [_rows(each) for each in node.outputs] == [_rows(each) for each in bands]
    if same and _MARK in node.meta:
        for old, new in zip(node.outputs, bands, strict=True):
            replace(old, new)


def _rows(band: ir.Value) -> Any:
    return band.shape[1] if band.shape is not None else None


def _column(
    editor: Editor, value: ir.Value | None, rows: Sequence[Any], bands: Bands, before: ir.Node
) -> list[ir.Value | None] | None:
    """What each band takes for an operand: its band, or a constant that all rows share; else None."""
    if value is None:
        return [None]
    if value in bands:
        own = bands[value]
        return list(own) if [_rows(each) for each in own] == list(rows) else None
    array = array_of(value)
    if array is not None:
        return [value] if array.ndim <= 1 or array.size == array.shape[-1] else None
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(value.shape or ()) != 4:
        return None
    codes = node.inputs[0]
    assert codes is not None
    pieces = bands.get(codes, [])
    if [_rows(each) for each in pieces] != list(rows):
        pieces = split(editor, codes, rows, before=before, name=f"{node.name}.for.{before.name}")
    return [_one(editor, node, [piece, *node.inputs[1:]], number) for number, piece in enumerate(pieces)]


def _parts(node: ir.Node) -> tuple[str, str]:
    """The name of a node as that of its quantizer, if it belongs to one, and the rest."""
    name = node.name or node.op_type
    own = next((each for each in (".quantize", ".clip") if name.endswith(each)), "")
    return name.removesuffix(own), own


def _one(editor: Editor, node: ir.Node, inputs: Sequence[ir.Value | None], number: int) -> ir.Value:
    """The node for one band."""
    stem, own = _parts(node)
    shape = next(
        each.shape for each in inputs if each is not None and each.shape is not None and len(each.shape) == 4
    )
    return editor.node(
        node.op_type,
        inputs,
        before=node,
        name=f"{stem}.{number}{own}",
        shape=shape,
        dtype=node.outputs[0].dtype,
        attributes=attributes_of(node),
    )
