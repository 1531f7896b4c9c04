"""Nodes of an OpenVINO model while quantizers are still stand-ins, each named by the key of its quantizer."""

from collections.abc import Iterable
from typing import Any

from qdetr_cli.export.program import Rounding

Roundings = dict[str, Rounding]


def put(node: Any, targets: Iterable[Any]) -> None:
    """Let what read something else read this node."""
    for target in list(targets):
        target.replace_source_output(node.output(0))


def name_of(node: Any) -> str:
    """The friendly name of a node, which for a stand-in is the key of its quantizer."""
    name: str = node.get_friendly_name()
    return name


def readers(output: Any) -> list[Any]:
    """The nodes that read an output, but for those that nothing reads in turn."""
    return [each.get_node() for each in output.get_target_inputs() if is_used(each.get_node())]


def is_used(node: Any) -> bool:
    """Whether anything reads a node, or it is a result."""
    return node.get_type_name() == "Result" or any(each.get_target_inputs() for each in node.outputs())


def is_stand_in(node: Any, roundings: Roundings) -> bool:
    """Whether a node stands for a quantizer."""
    return node.get_type_name() == "FakeQuantize" and name_of(node) in roundings
