"""Which operations of an OpenVINO file run on integer kernels, as its CPU compiler says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdetr_cli.export.kernels import Kernels, Kind, Operation, names_a_module
from qdetr_cli.sessions import package

KINDS: dict[str, Kind] = {
    "Convolution": "convolution",
    "Deconvolution": "convolution",
    "FullyConnected": "linear",
    "MatMul": "product",
}
FUSED = "Subgraph"  # several operations in one kernel, which may be a whole attention with its two products
INTEGERS = ("i8", "u8")
ARITHMETIC = ("Multiply", "Add", "Subtract", "Divide")  # what may follow a product in its kernel


def kernels(path: Path) -> Kernels:
    """What the compiler makes of a file on this machine; nothing is run."""
    core = package("openvino", str(path)).Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    executed = [each for each in compiled.get_runtime_model().get_ordered_ops() if _says(each, "layerType")]
    alone = {name for each in executed if _says(each, "layerType") in KINDS for name in _sources(each)}
    fused = [names for names in _products(model) if not names & alone]
    operations = [operation for each in executed for operation in _operations(each, fused)]
    return Kernels(runtime="openvino", operations=tuple(operations))


def _operations(executed: Any, fused: list[set[str]]) -> Iterator[Operation]:
    """What a compiled node computes; `fused` has the names of each product in a larger kernel."""
    layer, sources = _says(executed, "layerType"), _sources(executed)
    integer = _says(executed, "runtimePrecision") in INTEGERS
    kernel = _says(executed, "primitiveType")
    if layer in KINDS:
        name = _chosen({*sources, executed.get_friendly_name()})
        yield Operation(name=name, kind=KINDS[layer], integer=integer, kernel=kernel)
    elif layer == FUSED:
        for names in fused:
            if names & sources:
                yield Operation(name=_chosen(names), kind="product", integer=integer, kernel=kernel)


def _chosen(names: set[str]) -> str:
    """The one that says which module it is of, else the first."""
    return min(names, key=lambda name: (not names_a_module(name), name))


def _products(model: Any) -> Iterator[set[str]]:
    """For each product of two activations in the file, the names that its kernel may bear."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and not any(map(_is_constant, node.input_values())):
            yield set(_names(node))


def _names(node: Any) -> Iterator[str]:
    """The name of a node, and those of the arithmetic that follows it alone."""
    yield node.get_friendly_name()
    targets = list(node.output(0).get_target_inputs())
    if len(targets) == 1 and targets[0].get_node().get_type_name() in ARITHMETIC:
        yield from _names(targets[0].get_node())


def _is_constant(output: Any) -> bool:
    """Whether an output is a constant, or integers and their steps."""
    node = output.get_node()
    return node.get_type_name() == "Constant" or (
        node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
        and all(map(_is_constant, node.input_values()))
    )


def _sources(executed: Any) -> set[str]:
    """The names of the nodes of the file that a node of the compiled graph stands for."""
    names = _says(executed, "originalLayersNames").split(",")
    return {name.partition("/")[0].removesuffix("_original") for name in names}


def _says(executed: Any, key: str) -> str:
    info = executed.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
