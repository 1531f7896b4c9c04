"""The integer model in plain torch: slow, and what an exported file should compute, without a runtime.

It runs an exported program. Where a linear layer, a convolution or a product of matrices has two operands
from quantizers, it multiplies and adds whole numbers, and scales the sum once:

    y = (sum n_a n_b) * step_a * step_b + bias,    n = q - zero

The sums are exact (in float64, far below 2^53), the scaling is done in float64 and rounded to float32. So it
differs from the fake-quant model by the rounding of float32 sums alone, and from a file by that of its
scaling. Codes are those of the grid, bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qdetr_cli.export.program import Program, owned
from qdetr_cli.fake_quant import Grid
from qdetr_cli.operators import FAKE_QUANTIZE

aten = torch.ops.aten
_VIEWS = frozenset(  # what gives the same numbers in another shape, in eval mode
    {
        *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int),
        *(
            aten.transpose.int,
            aten.permute.default,
            aten.t.default,
            aten.numpy_T.default,
            aten.expand.default,
        ),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.select.int, aten.slice.Tensor),
        *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default),
        *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.dropout.default),
    }
)
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.dropout.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A quantized value: whole numbers n = q - zero in float64, and the step of each, of the same shape."""

    n: Tensor
    step: Tensor

    def seen(self, view: Callable[[Tensor], Tensor]) -> "Numbers":
        """The same in another shape."""
        return Numbers(n=view(self.n), step=view(self.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the integer model says. `values` has what each quantizer gives, by its key."""

    logits: Tensor  # (B, Q, C)
    pred_boxes: Tensor  # (B, Q, 4)
    values: Mapping[str, Tensor]
    integer_products: int  # layers and products that were computed on integers
    real_products: int  # those that had a real operand


@torch.no_grad()
def settled(program: Program, given: Mapping[str, Tensor]) -> Settled:
    """What the integer model says of images that have the program's size."""
    graph = program.exported.graph_module
    tensors = {node.name: tensor for node, tensor in owned(program.exported)}
    places = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    machine = _Machine(graph)
    logits, boxes = machine.run(*(tensors[name] if name in tensors else given[name] for name in places))
    return Settled(
        logits=logits,
        pred_boxes=boxes,
        values=machine.values,
        integer_products=machine.integer_products,
        real_products=machine.real_products,
    )


class _Machine(fx.Interpreter):
    """Runs the graph; `numbers` has the integers of each node that is a quantized value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.numbers: dict[fx.Node, Numbers] = {}
        self.values: dict[str, Tensor] = {}
        self.integer_products = self.real_products = 0
        self.products: dict[Any, Callable[..., Tensor]] = {
            aten.linear.default: _linear,
            aten.conv2d.default: _convolution(F.conv2d),
            aten.conv2d.padding: _convolution(F.conv2d),
            aten.conv_transpose2d.input: _convolution(F.conv_transpose2d),
            aten.matmul.default: _product,
            aten.bmm.default: _product,
        }

    def run_node(self, node: fx.Node) -> Any:
        """The value of a node."""
        if node.target is FAKE_QUANTIZE:
            return self._rounded(node)
        if node.target in self.products:
            operands = [self.numbers.get(each) for each in node.args[:2]]  # type: ignore[arg-type]
            if all(operands):
                self.integer_products += 1
                rest, options = self.fetch_args_kwargs_from_env(node)
                return self.products[node.target](*operands, *rest[2:], **options)
            self.real_products += 1
        result = super().run_node(node)
        if node.target in _VIEWS and node.args[0] in self.numbers:
            self._follow(node)
        return result

    def _rounded(self, node: fx.Node) -> Tensor:
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        x, step, zero, qmin, qmax, axis, key = arguments
        grid = Grid(step=step, zero=zero, qmin=qmin, qmax=qmax, shifted=False)
        q = grid.integers(x, axis)
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = -1
        n = q.double() if zero is None else q.double() - zero.double().reshape(shape)
        self.numbers[node] = Numbers(n=n, step=step.double().reshape(shape).expand_as(n))
        self.values[key] = result = grid.dequantize(q, axis)
        return result

    def _follow(self, node: fx.Node) -> None:
        arguments, options = self.fetch_args_kwargs_from_env(node)
        target: Any = node.target
        numbers = self.numbers[node.args[0]]  # type: ignore[index]
        view = (lambda x: x) if target in _CASTS else (lambda x: target(x, *arguments[1:], **options))
        self.numbers[node] = numbers.seen(view)


def _linear(x: Numbers, weight: Numbers, bias: Tensor | None = None) -> Tensor:
    """(.., D_out)."""
    scale = x.step[..., :1] * weight.step[:, 0]
    return _scaled(F.linear(x.n, weight.n), scale, bias)


def _product(x: Numbers, y: Numbers) -> Tensor:
    """(.., m, n) of (.., m, k) and (.., k, n)."""
    return _scaled(x.n @ y.n, x.step[..., :1] * y.step[..., :1, :], None)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolution(x: Numbers, weight: Numbers, bias: Tensor | None = None, *rest: Any) -> Tensor:
        """(B, D_out, H', W'). The input has one step."""
        sums = function(x.n, weight.n, None, *rest)
        transposed = function is F.conv_transpose2d
        steps = weight.step[0, :, 0, 0] if transposed else weight.step[:, 0, 0, 0]
        if transposed and len(steps) != sums.shape[1]:
            steps = steps.repeat(sums.shape[1] // len(steps))  # the groups share the steps of their channels
        scale = (x.step.flatten()[0] * steps)[:, None, None]
        return _scaled(sums, scale, None if bias is None else bias[:, None, None])

    return convolution


def _scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """sums * scale + bias, rounded once, to float32."""
    real = sums * scale
    return (real if bias is None else real + bias.double()).float()
