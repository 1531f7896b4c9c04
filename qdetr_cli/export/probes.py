"""Files whose quantizers can be read, and set: what a file computes inside.

In a file a quantizer is found by its path: in ONNX as its codes, which `<path>.quantize` or `<path>.clip`
gives, or what moves them where it was put before that (`<path>.concat`), or in parts (`<path>.0.quantize`..)
where what follows takes band by band; in OpenVINO as the operation of that name. A pass may have merged one
with another, or given its codes another order of dimensions.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

_INTEGER = "quantize|clip|max|min|maxpool|reshape|transpose|squeeze|unsqueeze|flatten|concat|identity"
_OWN = re.compile(
    rf"(?P<key>.*_quantizer(:\d+)?)(?P<part>(\.\d+)*)\.({_INTEGER})"
)  # a quantizer's nodes by name
_BANDS = 1  # the dimension that bands divide: rows, with channels last
Array = NDArray[Any]
Arrays = dict[str, Array]


class Probe(Protocol):
    """A file, opened to look inside. Images are of at most its size, and as many as it takes."""

    @property
    def images(self) -> int:
        """How many images it takes; 1 where it takes any number."""

    def values(self, given: Mapping[str, Tensor]) -> Arrays:
        """What each quantizer of activations gives for the images, by its key, and the outputs by name."""

    def values_after(self, given: Mapping[str, Tensor], true: Mapping[str, Array]) -> Arrays:
        """The same where what follows a quantizer gets its value in `true` instead of what was computed."""


def probe(path: Path) -> Probe:
    """The file at `path`, opened to look inside."""
    return OnnxProbe(path) if path.suffix == ".onnx" else OpenVinoProbe(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Where the codes of a quantizer are in an ONNX graph: (code - zero) * step is the real value."""

    names: tuple[str, ...]  # one, or the parts that lie behind each other in dimension `across`
    across: int
    step: Array
    zero: Array
    axis: int

    def real(self, parts: Sequence[Array]) -> Array:
        """The values of codes, float32."""
        codes = np.concatenate(parts, self.across) if len(parts) > 1 else parts[0]
        step, zero = self._along(codes.ndim)
        real: Array = (codes.astype(np.float32) - zero) * step
        return real

    def codes(self, values: Array, sizes: Sequence[int]) -> list[Array]:
        """The codes of values that lie on the grid, in parts of these sizes."""
        step, zero = self._along(values.ndim)
        ends = np.iinfo(self.zero.dtype)
        codes = np.clip(np.rint(values / step) + zero, ends.min, ends.max).astype(self.zero.dtype)
        return np.split(codes, np.cumsum(sizes)[:-1], self.across) if len(sizes) > 1 else [codes]

    def _along(self, rank: int) -> tuple[Array, Array]:
        shape = [-1 if place == self.axis else 1 for place in range(rank)] if self.step.ndim else []
        return self.step.reshape(shape), self.zero.astype(np.float32).reshape(shape)


class OnnxProbe:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(path)
        self.outputs = [each.name for each in self.model.graph.output]
        self.found = dict(_codes(self.model))
        self.sizes: dict[str, list[int]] = {}  # of the parts of each quantizer's codes

    @property
    def images(self) -> int:
        """How many images it takes; 1 where it takes any number."""
        return int(self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value) or 1

    def values(self, given: Mapping[str, Tensor]) -> Arrays:
        """What each quantizer gives, and the outputs."""
        return self._run(given, {})

    def values_after(self, given: Mapping[str, Tensor], true: Mapping[str, Array]) -> Arrays:
        """What each quantizer gives where all others gave their true values, and the outputs."""
        if not self.sizes:
            self._run(given, {})
        set_: Arrays = {}
        for key in self.found.keys() & true.keys():
            each = self.found[key]
            set_ |= zip(each.names, each.codes(true[key], self.sizes[key]), strict=True)
        return self._run(given, set_)

    def _run(self, given: Mapping[str, Tensor], set_: Arrays) -> Arrays:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        model = self._opened(set_).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        shapes = {each.name: tuple(each.shape) for each in session.get_inputs()}
        own = {name: shape for name, shape in shapes.items() if name in given}
        feed = feed_of(given, own) | {_set(name): codes for name, codes in set_.items()}
        names = [*dict.fromkeys((*self._inner(), *self.outputs))]
        results = dict(zip(names, session.run(names, feed), strict=True))
        parts = {key: [results[name] for name in each.names] for key, each in self.found.items()}
        self.sizes = {
            key: [_size(part, self.found[key].across) for part in own] for key, own in parts.items()
        }
        inner = {key: each.real(parts[key]) for key, each in self.found.items()}
        return inner | {name: results[name] for name in self.outputs}

    def _inner(self) -> list[str]:
        """The names of all codes."""
        return [*dict.fromkeys(name for each in self.found.values() for name in each.names)]

    def _opened(self, set_: Mapping[str, Array]) -> Any:
        """The model with all codes among its outputs, and inputs in place of those that are set."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name in self._inner():
            if name not in self.outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        for name, codes in set_.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(codes.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(_set(name), kind, codes.shape))
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name in set_:
                    node.input[place] = _set(name)
        return model


def _size(part: Array, across: int) -> int:
    return part.shape[across] if part.ndim > across else 1


def _set(name: str) -> str:
    return f"{name}.set"


def _codes(model: Any) -> Iterator[tuple[str, Codes]]:
    """The quantizers of activations by their keys; the last of a quantizer's nodes gives its codes."""
    from onnx import numpy_helper

    constants = {each.name: each for each in model.graph.initializer}
    rounding: dict[str, Any] = {}  # the QuantizeLinear of each key, or one of them
    last: dict[str, dict[str, Any]] = {}  # by key, then by part: "" for the whole, else its number
    for node in model.graph.node:
        found = _OWN.fullmatch(node.name)
        if found is None or node.op_type == "DequantizeLinear":
            continue
        if node.op_type == "QuantizeLinear" and all(each in constants for each in node.input[1:3]):
            rounding[found["key"]] = node
        if found["key"] in rounding:
            last.setdefault(found["key"], {})[found["part"]] = node
    for key, node in rounding.items():
        step, zero = (numpy_helper.to_array(constants[each]) for each in node.input[1:3])
        names, across = _parts(last[key])
        yield key, Codes(names=names, across=across, step=step, zero=zero, axis=_attribute(node, "axis", 1))


def _parts(last: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """The names of a quantizer's codes, and the dimension that divides them.

    They are taken in parts where these are all that there is, or where the whole is nothing but their
    joining: what takes a part then gets its true codes as well.
    """
    whole = last.get("")
    numbers = sorted(last.keys() - {""}, key=lambda part: [int(each) for each in part.split(".")[1:]])
    parts = tuple(last[number].output[0] for number in numbers)
    if whole is None:
        return parts, _BANDS
    if parts and whole.op_type == "Concat" and tuple(whole.input) == parts:
        return parts, _attribute(whole, "axis", _BANDS)
    return (whole.output[0],), _BANDS


def _attribute(node: Any, name: str, default: int) -> int:
    found: int = next((each.i for each in node.attribute if each.name == name), default)
    return found


class OpenVinoProbe:
    """An OpenVINO file."""

    def __init__(self, path: Path) -> None:
        import openvino

        self.path = path
        self.model = openvino.Core().read_model(path)

    @property
    def images(self) -> int:
        """How many images it takes; 1 where it takes any number."""
        first = self.model.inputs[0].get_partial_shape()[0]
        return first.get_length() if first.is_static else 1

    def values(self, given: Mapping[str, Tensor]) -> Arrays:
        """What each quantizer gives, and the outputs."""
        model = self.model.clone()
        kept = {node.get_friendly_name(): node for node in model.get_ordered_ops() if _is_value(node)}
        return self._run(model, kept, given, {})

    def values_after(self, given: Mapping[str, Tensor], true: Mapping[str, Array]) -> Arrays:
        """What each quantizer gives where all others gave their true values, and the outputs.

        A quantizer stays in its place, where the compiler looks for it, and gets the values that it gives.
        What it would have given is the result of another one like it.
        """
        from openvino import opset13 as op

        model = self.model.clone()
        kept, set_ = {}, {}
        for node in model.get_ordered_ops():
            name = node.get_friendly_name()
            if name in true and _is_value(node) and node.get_type_name() == "FakeQuantize":
                given_ = op.parameter(node.get_output_partial_shape(0), np.float32)
                given_.output(0).set_names({_set(name)})
                kept[name] = op.fake_quantize(*node.input_values(), node.get_attributes()["levels"])
                node.input(0).replace_source_output(given_.output(0))
                model.add_parameters([given_])
                set_[_set(name)] = true[name]
        return self._run(model, kept, given, set_)

    def _run(self, model: Any, kept: Mapping[str, Any], given: Mapping[str, Tensor], set_: Arrays) -> Arrays:
        """The outputs of a model, and of the nodes in `kept`."""
        import openvino

        own = [port.get_any_name() for port in model.outputs]
        if kept:
            model.add_outputs([node.output(0) for node in kept.values()])
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        shapes = {port.get_any_name(): _dims(port.get_partial_shape()) for port in compiled.inputs}
        free = {name: shape for name, shape in shapes.items() if name not in set_}
        results = compiled(feed_of(given, free) | set_)
        names = (*own, *kept)
        return {name: np.array(results[place]) for place, name in enumerate(names)}


def _is_value(node: Any) -> bool:
    from openvino import Type

    name: str = node.get_friendly_name()
    activation = "_quantizer" in name and "weight_quantizer" not in name
    return activation and node.get_output_size() == 1 and node.get_output_element_type(0) == Type.f32


def _dims(shape: Any) -> tuple[Any, ...]:
    return tuple(side.get_length() if side.is_static else None for side in shape)


def feed_of(given: Mapping[str, Tensor], shapes: Mapping[str, Collection[Any]]) -> Arrays:
    """The inputs of a file: images padded at the right and bottom to its shapes."""
    feed = {}
    for name, shape in shapes.items():
        *_, height, width = (side if isinstance(side, int) else None for side in shape)
        value = given[name]
        below, right = (
            (height or value.shape[-2]) - value.shape[-2],
            (width or value.shape[-1]) - value.shape[-1],
        )
        feed[name] = pad(value, (0, right, 0, below)).numpy()
    return feed


def in_order(wanted: Tensor, found: Array) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """`found` in each order of dimensions that gives it the shape that is wanted, with that order."""
    from itertools import permutations

    value = torch.from_numpy(np.ascontiguousarray(found)).float()
    if value.dim() == wanted.dim():
        for order in permutations(range(value.dim())):
            turned = value.permute(order)
            if turned.shape == wanted.shape:
                yield order, turned
