"""What a program computes from no input: in the order of its graph, for tensors are written in place."""

import torch
from torch import Tensor, nn

from qdetr_cli.export.constants import Constants
from qdetr_cli.export.program import owned


class Written(nn.Module):
    """A constant of which a view is written, then read; the same with what an input gives; a buffer too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.full((2, 4), 3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = self.start * 1
        fixed[:, 2:] *= 2
        mixed = torch.ones(2, 4)
        mixed[:, :1] = x
        return fixed.neg() + x, mixed.exp() + x, self.start + x


def constants() -> tuple[Constants, list]:
    program = torch.export.export(Written(), (torch.full((2, 1), 7.0),), strict=False)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return Constants(program.graph, dict(owned(program))), nodes


def named(nodes: list, part: str):
    return next(node for node in nodes if part in str(node.target))


def test_a_value_has_what_was_written_to_its_views_before_it_was_read():
    found, nodes = constants()
    negative = named(nodes, "neg")
    assert found.has(negative)
    assert found(negative).tolist() == [[-3.0, -3.0, -6.0, -6.0]] * 2


def test_memory_that_an_input_is_written_to_is_no_constant():
    found, nodes = constants()
    assert not found.has(named(nodes, "exp"))
    assert not found.has(named(nodes, "ones"))


def test_what_is_no_node_is_itself():
    found, _ = constants()
    assert found.has(3)
    assert found(3) == 3


def test_a_buffer_of_the_model_is_left_as_it_was():
    model = Written()

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            self.inner.start.mul_(2)
            return self.inner.start.neg() + x

    program = torch.export.export(Writes(), (torch.ones(2, 4),), strict=False)
    before = {name: each.clone() for name, each in program.state_dict.items()}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    found = Constants(program.graph, dict(owned(program)))
    assert found(named(nodes, "neg")).tolist() == [[-6.0] * 4] * 2
    assert all(torch.equal(each, before[name]) for name, each in program.state_dict.items())
