"""Small ONNX graphs with quantizers, as the plain emission writes them, for tests of a runtime's pass."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


class Drawing:
    """A graph that grows by calls; every method gives the name of a value."""

    def __init__(self, shape: list[Any], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs = {"x": shape}
        self.count = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def constant(self, array: Any, stem: str = "constant") -> str:
        name = self.name(stem)
        self.constants[name] = np.asarray(array)
        return name

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or self.name(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def rounded(self, x: str, step: float, zero: int = 0, bits: int = 8) -> str:
        """x through a quantizer with one step."""
        path = self.name("quantizer")
        ends = (self.constant(np.float32(step)), self.constant(np.uint8(zero)))
        codes = self.node("QuantizeLinear", x, *ends, name=f"{path}.quantize")
        if bits < 8:
            limits = (self.constant(np.uint8(0)), self.constant(np.uint8(2**bits - 1)))
            codes = self.node("Clip", codes, *limits, name=f"{path}.clip")
        return self.node("DequantizeLinear", codes, *ends)

    def by_head(self, x: str, steps: Any, zeros: Any, bits: int = 8) -> str:
        """x (B, N, ..) through a quantizer with a step for each head."""
        path = self.name("quantizer")
        steps, zeros = np.asarray(steps, np.float32), np.asarray(zeros, np.uint8)
        ends = (self.constant(steps), self.constant(zeros))
        codes = self.node("QuantizeLinear", x, *ends, name=f"{path}.quantize", axis=1)
        if bits < 8:
            limits = (self.constant(np.uint8(0)), self.constant(np.uint8(2**bits - 1)))
            codes = self.node("Clip", codes, *limits, name=f"{path}.clip")
        real = self.node("Cast", codes, to=TensorProto.FLOAT)
        moved = self.node("Sub", real, self.constant(zeros.astype(np.float32).reshape(1, -1, 1, 1)))
        return self.node("Mul", moved, self.constant(steps.reshape(1, -1, 1, 1)))

    def weight(self, *shape: int, bits: int = 8, axis: int = 0) -> str:
        high = 2 ** (bits - 1) - 1
        codes = self.constant(self.random.integers(-high - 1, high + 1, shape).astype(np.int8))
        depth = np.prod(shape) / shape[axis]
        steps = self.random.uniform(0.5, 1.5, shape[axis]) / (high * depth**0.5)
        return self.node("DequantizeLinear", codes, self.constant(steps.astype(np.float32)), axis=axis)

    def conv(
        self, x: str, shape: tuple[int, ...], *, bias: bool = True, bits: int = 8, **options: Any
    ) -> str:
        """A convolution with weights of `shape`, padded to keep the size at stride 1."""
        pads = options.pop("pads", [side // 2 for side in shape[2:]] * 2)
        inputs = [x, self.weight(*shape, bits=bits)]
        if bias:
            inputs.append(self.constant(self.random.normal(0, 0.5, shape[0]).astype(np.float32)))
        return self.node("Conv", *inputs, name=self.name("node_conv"), pads=pads, **options)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        """x (.., inputs) times a transposed weight, plus a bias."""
        turned = self.node("Transpose", self.weight(outputs, inputs), perm=[1, 0])
        y = self.node("MatMul", x, turned, name=self.name("node_linear"))
        return self.node("Add", y, self.constant(self.random.normal(0, 0.5, outputs).astype(np.float32)))

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "drawing",
            [
                helper.make_tensor_value_info(key, TensorProto.FLOAT, each)
                for key, each in self.inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)

    def images(self, batch: int = 1) -> dict[str, Any]:
        return {
            key: self.random.normal(
                0, 1, [batch if isinstance(side, str) else side for side in shape]
            ).astype(np.float32)
            for key, shape in self.inputs.items()
        }


def run(model: onnx.ModelProto, given: dict[str, Any], *, optimized: bool) -> list[Any]:
    return _session(model, optimized).run(None, given)


def kernels_of(model: onnx.ModelProto, folder: Any) -> list[str]:
    """The operators of the graph that ONNX Runtime executes."""
    path = folder / "optimized.onnx"
    _session(model, True, str(path))
    return [node.op_type for node in onnx.load(path).graph.node]


def _session(model: onnx.ModelProto, optimized: bool, kept: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if kept:
        options.optimized_model_filepath = kept
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
