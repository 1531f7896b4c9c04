"""Small exported files, made by hand: their outputs say what they were given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper
from tiny_runs import DIGITS

from qdetr_cli.export.metadata import Metadata
from qdetr_cli.processors import Processor
from qdetr_cli.sessions import KEY

QUERIES = 2
PADDED = Processor(shortest=64, longest=96, pad=True)
SQUASHED = Processor(size=(64, 64))


def metadata(family: str = "detr", **changes: Any) -> Metadata:
    """What a file of a tiny detector of digits says of itself."""
    pixels = PADDED if family == "detr" else SQUASHED
    fields: dict[str, Any] = {
        "family": family,
        "class_names": dict(enumerate(DIGITS)),
        "processor": pixels.to_config(),
        "size": (64, 96),
        "recipe": {"schema": 1},
        "source": "tiny",
        "versions": {"qdetr": "0"},
    }
    return Metadata(**fields | changes)


def write_onnx(
    path: Path,
    *,
    batch: int | str = "batch",
    size: tuple[int | str, int | str] = (64, 96),
    mask: bool = True,
    told: Metadata | str | None = None,
    outputs: tuple[str, str] = ("logits", "pred_boxes"),
) -> Path:
    """A detector: of each image logits (Q, 11) are the sum of its pixels, of its mask, and then zeros.

    Its boxes (Q, 4) are constant.
    """
    model = helper.make_model(
        _graph(batch, size, mask, outputs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    text = told.to_json() if isinstance(told, Metadata) else told
    if text is not None:
        helper.set_model_props(model, {KEY: text})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_openvino(path: Path, **options: Any) -> Path:
    """The same detector as .xml and .bin."""
    told = options.pop("told", None)
    source = write_onnx(path.with_suffix(".onnx"), **options)
    model = openvino.convert_model(source)
    source.unlink()
    if told is not None:
        model.set_rt_info(told.to_json() if isinstance(told, Metadata) else told, [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def write_file(path: Path, **options: Any) -> Path:
    """A detector of the kind that the suffix says."""
    return (write_onnx if path.suffix == ".onnx" else write_openvino)(path, **options)


def _graph(
    batch: int | str, size: tuple[int | str, int | str], mask: bool, outputs: tuple[str, str]
) -> onnx.GraphProto:
    classes = len(DIGITS) + 1
    first, second = np.zeros((2, 1, QUERIES, classes), dtype=np.float32)
    first[..., 0], second[..., 1] = 1, 1
    boxes = np.full((1, QUERIES, 4), 0.25, dtype=np.float32)
    constants: Mapping[str, np.ndarray[Any, Any]] = {
        "first": first,
        "second": second,
        "boxes": boxes,
        "nothing": np.float32(0)[None],
        "all": np.array([2, 3], dtype=np.int64),
        "channels": np.array([1], dtype=np.int64),
        "sides": np.array([1, 2], dtype=np.int64),
        "axis": np.array([2], dtype=np.int64),
    }
    nodes = [
        helper.make_node("ReduceSum", ["pixel_values", "all"], ["rows"], keepdims=0),  # (B, 3)
        helper.make_node("ReduceSum", ["rows", "channels"], ["sum"], keepdims=1),  # (B, 1)
        helper.make_node("Unsqueeze", ["sum", "axis"], ["pixels"]),  # (B, 1, 1)
        helper.make_node("Mul", ["pixels", "first"], ["seen"]),
        helper.make_node("Mul", ["pixels", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "boxes"], [outputs[1]]),
    ]
    if mask:
        nodes += [
            helper.make_node("Cast", ["pixel_mask"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["real", "sides"], ["count"], keepdims=1),  # (B, 1, 1)
            helper.make_node("Mul", ["count", "second"], ["masked"]),
            helper.make_node("Add", ["seen", "masked"], [outputs[0]]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["seen"], [outputs[0]]))
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, 3, *size])]
    if mask:
        inputs.append(helper.make_tensor_value_info("pixel_mask", TensorProto.INT64, [batch, *size]))
    shapes = ([batch, QUERIES, classes], [batch, QUERIES, 4])
    return helper.make_graph(
        nodes,
        "detector",
        inputs,
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in zip(outputs, shapes, strict=True)
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
