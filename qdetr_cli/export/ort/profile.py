"""Which kernels ONNX Runtime takes for the layers of a file, as its profile says."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from qdetr_cli.export.kernels import Kernels, Kind, Operation
from qdetr_cli.export.ort.editor import KIND

_CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv")
_PRODUCTS = (
    *("MatMul", "Gemm", "MatMulInteger", "FusedMatMul", "FusedGemm", "QGemm", "QLinearMatMul"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"),
)
_INTEGER = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
_ADDED = re.compile(r"(_token_\d+|_nchwc|/.*)+$")  # to a node's name, by the runtime
_BAND = re.compile(r"\.\d+$")


def kernels(path: Path, size: tuple[int, int] = (64, 64)) -> Kernels:
    """What of the file runs on integer kernels: every layer that a run on zeros executed, bands as one.

    `size` (H, W) is for files that take any.
    """
    kinds = dict(_kinds(onnx.load(path, load_external_data=False).graph))
    found: dict[str, Operation] = {}
    for name, kernel in _executed(path, size):
        layer = _BAND.sub("", name)
        kind = kinds.get(name, "convolution" if kernel in _CONVOLUTIONS else "linear")
        if layer not in found or found[layer].integer:  # a layer is as slow as its slowest band
            found[layer] = Operation(name=layer, kind=kind, integer=kernel in _INTEGER, kernel=kernel)
    return Kernels(runtime="onnxruntime", operations=tuple(found.values()))


def _executed(path: Path, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """The nodes that compute products, by their name in the file, and the kernel of each, in order."""
    for event in _profile(path, size):
        kernel = event.get("args", {}).get("op_name", "")
        name = event.get("name", "")
        if kernel in (*_CONVOLUTIONS, *_PRODUCTS) and name.endswith("_kernel_time"):
            yield _ADDED.sub("", name.removesuffix("_kernel_time")), kernel


def _profile(path: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The events of one run."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, {each.name: _zeros(each, size) for each in session.get_inputs()})
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def _zeros(value: Any, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """What an input can be: zeros, one image where their number is free, sides of `size` where they are."""
    least = [1] * (len(value.shape) - 2) + list(size)
    shape = [side if isinstance(side, int) else free for side, free in zip(value.shape, least, strict=True)]
    return np.zeros(shape, np.int64 if "int64" in value.type else np.float32)


def _kinds(graph: onnx.GraphProto) -> Iterator[tuple[str, Kind]]:
    """What each node is: the pass says it where convolutions became products."""
    constant = {each.name for each in graph.initializer}
    for node in graph.node:
        said = {each.key: each.value for each in node.metadata_props}.get(KIND)
        if node.op_type in ("DequantizeLinear", "Transpose") and node.input[0] in constant:
            constant.update(node.output)
        if node.op_type in _CONVOLUTIONS or said == "convolution":
            yield node.name, "convolution"
        elif node.op_type in _PRODUCTS:
            fixed = any(each in constant for each in node.input[:2])
            yield node.name, "linear" if fixed else "product"
