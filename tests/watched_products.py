"""Every product of two tensors that a forward pass computes, seen below PyTorch's functions, for tests.

Nothing of the package is asked: the dispatcher says what is multiplied, the module stack says by whom, and
whether an operand lies on a grid is computed from its values, a step, an offset and the format of the plan.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdetr_cli.plan import ModulePlan, Plan
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import QuantFormat

aten = torch.ops.aten
OPERANDS: dict[Any, tuple[int, int]] = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.mv: (0, 1),
    aten.dot: (0, 1),
    aten.convolution: (0, 1),
}
LIKE_A_PRODUCT = re.compile(
    r"mm|mv|dot|conv|attention|einsum|tensordot|bilinear$|(^|_)linear|lstm|addr|cdist"
)
WEIGHTED = (aten.mul, aten.mul_)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """One product: the innermost module that computes it, its operation and its two operands."""

    path: str
    operation: str
    left: Tensor
    right: Tensor


class Watch(TorchDispatchMode):
    """Keeps every product, every sampling of a feature map, and every weighting of what was sampled."""

    def __init__(self, samplers: tuple[str, ...]) -> None:
        super().__init__()
        self.samplers = samplers  # paths within which an index or grid_sample reads values
        self.stack: list[str] = [""]
        self.products: list[Product] = []
        self.sampled: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet, path = func.overloadpacket, self.stack[-1]
        if path.endswith("_quantizer"):
            return result
        if packet in OPERANDS:
            left, right = (args[index] for index in OPERANDS[packet])
            self._keep(packet, left, right)
        elif inside(path, self.samplers):
            self._follow_sampling(packet, args, result)
        elif packet is not aten.upsample_bilinear2d:
            assert not LIKE_A_PRODUCT.search(packet.__name__), f"{path}: {func} is a product nobody looks at"
        return result

    def _keep(self, packet: Any, left: Tensor, right: Tensor) -> None:
        self.products.append(
            Product(self.stack[-1], packet.__name__, left.detach().clone(), right.detach().clone())
        )

    def _follow_sampling(self, packet: Any, args: Any, result: Any) -> None:
        """What is sampled goes, reshaped and concatenated, into one product with the weights."""
        tensors = [each for each in _flat(args) if isinstance(each, Tensor)]
        if packet is aten.grid_sampler_2d or (packet is aten.index and args[0].dim() == 4):
            self._keep(packet, args[0], args[0])
            self.sampled[id(result)] = result
        elif any(id(each) in self.sampled for each in tensors):
            if packet in WEIGHTED:
                value, weights = sorted(tensors, key=lambda each: id(each) not in self.sampled)
                self._keep(packet, value, weights)
            else:
                self.sampled |= {id(each): each for each in _flat((result,)) if isinstance(each, Tensor)}


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def watched(model: nn.Module, samplers: tuple[str, ...]) -> Iterator[Watch]:
    """A watch that knows at any time which module computes."""
    watch = Watch(samplers)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: watch.stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: watch.stack.pop() and None, always_call=True))
    try:
        with torch.no_grad(), watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def inside(path: str, owners: tuple[str, ...]) -> bool:
    """Whether a module is one of these or in one of them."""
    return any(path == owner or path.startswith(owner + ".") for owner in owners)


def constant(one: Product, other: Product) -> bool:
    """True for what is computed alike for other images: positions, not activations."""
    return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


@dataclass(frozen=True, slots=True)
class Seen:
    """One operand that the plan has a word on: its slot, and whether its values lie on the slot's grid."""

    path: str
    slot: str
    quantized: bool  # in the plan
    on_grid: bool
    zero: bool  # nothing but zeros, which lie on every grid


def seen(model: nn.Module, plan: Plan, products: list[Product]) -> tuple[list[Seen], list[Product]]:
    """What the plan has a word on, and the products of which it says nothing."""
    modules = {name: each for each in plan.modules for name in (each.path, *each.aliases)}
    calls: dict[str, int] = {}
    found: list[Seen] = []
    strange: list[Product] = []
    for product in products:
        module = owner(product.path, modules)
        if module is None:
            strange.append(product)
            continue
        for slot, operand in _operands(module, product, calls):
            format = module.format(slot)  # type: ignore[arg-type]
            on = format is not None and on_grid(model, module, slot, format, operand)
            found.append(Seen(module.path, slot, format is not None, on, not operand.any()))
    return found, strange


def owner(path: str, modules: dict[str, ModulePlan]) -> ModulePlan | None:
    """The module of the plan that computes at this path: itself, or the attention that it is a part of."""
    if path in modules:
        return modules[path]
    while path:
        path = path.rpartition(".")[0]
        if path in modules and modules[path].op in ("attention", "deformable"):
            return modules[path]
    return None


def _operands(module: ModulePlan, product: Product, calls: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """(slot, operand) of one product. Dense attention multiplies q with k, then probs with v."""
    if module.op in ("linear", "conv"):
        yield "input", product.left
        yield "weight", product.right
    elif module.op == "deformable":
        yield ("probs", product.right) if product.operation in ("mul", "mul_") else ("v", product.left)
    else:
        second = calls.get(module.path, 0) % 2
        calls[module.path] = calls.get(module.path, 0) + 1
        yield ("probs" if second else "q"), product.left
        yield ("v" if second else "k"), product.right


def on_grid(model: nn.Module, module: ModulePlan, slot: str, format: QuantFormat, operand: Tensor) -> bool:
    """Whether every value is a whole number of steps, to the last bit, and within the format's range."""
    quantizer = model.get_submodule(f"{module.path}.{slot}_quantizer")
    assert isinstance(quantizer, FakeQuantizer)
    step = quantizer.state_dict()["step"]
    offset = quantizer.state_dict().get("offset", torch.zeros_like(step)).round()
    if format.per == "head":
        operand = operand.unflatten(0, (-1, step.numel())).movedim(1, -1)  # (B * N, ..) -> (B, .., N)
    elif format.per == "channel" and module.op == "conv":
        transposed = isinstance(model.get_submodule(module.path), nn.ConvTranspose2d)
        operand = operand.movedim(int(transposed), -1)  # output channels last
    whole = (operand / step).round()
    low, high = (whole + offset).aminmax()
    within = format.qmin <= float(low) and float(high) <= format.qmax
    return within and torch.equal(whole * step, operand)
