"""A program as an OpenVINO model, in the forms that OpenVINO's CPU compiler turns into integer kernels.

Weights are int8 constants, converted and multiplied by their steps; activations are rounded as
`openvino_grids` says, and their products are made as `openvino_products` says. What depends on no input is
computed beforehand: the compiler fails on integer layers of constants.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qdetr_cli.export.onnx_graph import Marked
from qdetr_cli.export.openvino_grids import (
    Array,
    constant_numbers,
    is_wide,
    number,
    numbers,
    rounded,
    stored,
)
from qdetr_cli.export.openvino_nodes import Roundings, is_stand_in, name_of, put
from qdetr_cli.export.openvino_placement import placed
from qdetr_cli.export.openvino_products import integer_product
from qdetr_cli.export.openvino_topk import keep_order_of_equals
from qdetr_cli.sessions import package

DOMAIN = "org.openvinotoolkit"  # of operators that OpenVINO's reader of ONNX knows beyond the standard

# Without it, a layer with integer weights and float activations would round its activations too.
NOT_DYNAMIC = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]


def openvino_model(graph: Marked, *, portable: bool = False) -> Any:
    """The openvino.Model of a graph whose quantizers are still nodes; the graph is used up.

    `portable`: what processors without VNNI would add in 16 bits, and cut, stays float: see `instructions`.
    """
    openvino = package("openvino", "--to openvino")
    roundings = dict(graph.program.roundings)
    _put_stand_ins(graph)
    model = openvino.Core().read_model(ir.to_proto(graph.model).SerializeToString())
    keep_order_of_equals(model)
    _fold_constants(model, roundings)
    roundings = placed(model, roundings)
    _round_products(model, roundings, portable)
    _round_activations(model, roundings)
    for parameter in _constants(model, roundings):
        _store(parameter, roundings, portable)
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    model.set_rt_info("0", NOT_DYNAMIC)
    return model


def _put_stand_ins(graph: Marked) -> None:
    """Put what OpenVINO reads in the place of quantizers, by their keys: inputs for constants, else nodes."""
    onnx = graph.model.graph
    ends = [_scalar(onnx, f"qdetr.{value}", float(value)) for value in (0, 1)]
    for node, key, rounding in graph.quantizers():
        old = node.outputs[0]
        if rounding.constant is None:
            new = ir.node(
                "FakeQuantize", [node.inputs[0], *ends, *ends], {"levels": 2}, domain=DOMAIN, name=key
            )
            value = new.outputs[0]
            onnx.insert_before(node, new)
        else:
            value = ir.Value()
            onnx.inputs.append(value)
        value.name, value.shape, value.type = key, old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        onnx.remove(node, safe=True)
    graph.model.opset_imports.pop("qdetr", None)
    graph.model.opset_imports[DOMAIN] = 1


def _scalar(graph: Any, name: str, value: float) -> ir.Value:
    tensor = ir.tensor(np.array(value, np.float32), name=name)
    made = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    return made


def _fold_constants(model: Any, roundings: Roundings) -> None:
    """Compute all that depends on no input or on shapes alone, but for the weights of layers that do."""
    from openvino.passes import ConstantFolding, Manager

    shapes = Manager()
    shapes.register_pass(ConstantFolding())
    more = True
    while more:
        shapes.run_passes(model)
        _compute(_border(model))
        more = False
        for parameter in _constants(model, roundings):
            for targets, codes, step in _ends(parameter, roundings):
                free = [each for each in targets if not _waits(each, name_of(parameter))]
                put(number(codes * step), free)
                more = more or bool(free)


def _border(model: Any) -> list[Any]:
    """The outputs that depend on no input, and are used by what does."""
    dependent: set[str] = set()
    border = []
    for node in model.get_ordered_ops():
        sources = node.input_values()
        if node.get_type_name() == "Parameter" or any(
            name_of(each.get_node()) in dependent for each in sources
        ):
            dependent.add(name_of(node))
            border += [each for each in sources if not _known(each, dependent)]
    return list({(name_of(each.get_node()), each.get_index()): each for each in border}.values())


def _known(output: Any, dependent: set[str]) -> bool:
    node = output.get_node()
    return name_of(node) in dependent or node.get_type_name() == "Constant"


def _compute(outputs: list[Any]) -> None:
    """Put constants in the place of outputs that depend on no input."""
    import openvino
    from openvino import opset13 as op

    if not outputs:
        return
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Model(outputs, [], "constants"), "CPU", settings)
    results = compiled([])
    for index, output in enumerate(outputs):
        targets = [each for each in output.get_target_inputs() if each.get_node().get_type_name() != "Result"]
        put(op.constant(results[index]), targets)


def _constants(model: Any, roundings: Roundings) -> list[Any]:
    """The inputs that stand for what is rounded beforehand."""
    return [each for each in model.get_parameters() if name_of(each) in roundings]


def _waits(target: Any, key: str) -> bool:
    """Whether what uses a constant depends on an input too, and in integers: a layer, or a product."""
    node = target.get_node()
    others = [node.input_value(each).get_node() for each in range(node.get_input_size())]
    del others[target.get_index()]
    if _is_weight(key):
        return any(each.get_type_name() != "Constant" for each in others)
    return bool(node.get_type_name() == "MatMul" and others[0].get_type_name() == "FakeQuantize")


def _ends(parameter: Any, roundings: Roundings) -> list[tuple[list[Any], Array, Array]]:
    """Where the stand-in of a constant is used, past views, with its numbers and steps as seen there."""
    codes, step = constant_numbers(roundings[name_of(parameter)])
    return list(_past_views(parameter.output(0), codes, np.broadcast_to(step, codes.shape)))


def _past_views(output: Any, codes: Array, step: Array) -> Iterator[tuple[list[Any], Array, Array]]:
    direct = []
    for target in output.get_target_inputs():
        node = target.get_node()
        kind = node.get_type_name()
        if kind == "Transpose":
            order = node.input_value(1).get_node().get_data()
            yield from _past_views(node.output(0), codes.transpose(order), step.transpose(order))
        elif kind == "Reshape":
            shape = tuple(node.get_output_shape(0))
            yield from _past_views(node.output(0), codes.reshape(shape), step.reshape(shape))
        else:
            direct.append(target)
    if direct:
        yield direct, codes, step


def _round_products(model: Any, roundings: Roundings, portable: bool) -> None:
    """Put an integer product in the place of each MatMul of two quantized activations."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        keys = [name_of(node.input_value(side).get_node()) for side in (0, 1)]
        sides = [roundings[key] for key in keys if key in roundings and not _is_weight(key)]
        if len(sides) == 2:
            made = integer_product(node, *sides, real=portable and is_wide(sides[1]))
            put(made, node.output(0).get_target_inputs())


def _round_activations(model: Any, roundings: Roundings) -> None:
    """Put a FakeQuantize of its grid in the place of each stand-in that is used."""
    for node in model.get_ordered_ops():
        if is_stand_in(node, roundings):
            x = node.input_value(0)
            made = rounded(x, numbers(roundings[name_of(node)], len(x.get_partial_shape())))
            made.set_friendly_name(name_of(node))
            put(made, node.output(0).get_target_inputs())


def _store(parameter: Any, roundings: Roundings, portable: bool) -> None:
    """Put integers and their steps in the place of the stand-in of a weight."""
    is_real = portable and is_wide(roundings[name_of(parameter)])
    for targets, codes, step in _ends(parameter, roundings):
        kept = number(codes * step) if is_real else stored(codes, _compact(step), name_of(parameter))
        put(kept, targets)


def _compact(step: Array) -> Array:
    """The steps without the dimensions along which they are all alike, which stay as 1."""
    for axis in range(step.ndim):
        first = step.take([0], axis)
        step = first if (step == first).all() else step
    return step


def _is_weight(key: str) -> bool:
    return key.partition(":")[0].endswith(".weight_quantizer")
