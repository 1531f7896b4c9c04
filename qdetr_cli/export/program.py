"""A detector as a program: one torch.export, at one size or any, in which each quantizer is one node."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from qdetr_cli.errors import ExportError
from qdetr_cli.export.constants import Constants
from qdetr_cli.fake_quant import Grid
from qdetr_cli.operators import FAKE_QUANTIZE
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.ranges import has_free_offset
from qdetr_cli.recording import undisturbed
from qdetr_cli.rewrite import quantizers

INPUTS = ("pixel_values", "pixel_mask")
SIDES = {"pixel_values": (2, 3), "pixel_mask": (1, 2)}  # the dimensions of height and width
SMALLEST = 64  # pixels of a side that is free: a backbone has a stride of 32
OUTPUTS = ("logits", "pred_boxes")

aten = torch.ops.aten
_CHECKS = (
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One call of a quantizer: its grid, and which dimension owns the steps."""

    grid: Grid
    axis: int | None
    constant: Tensor | None  # what is rounded, where it depends on no input: a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An exported detector. `roundings` has a key for each fake-quantize node: its `path` argument."""

    exported: ExportedProgram
    inputs: tuple[str, ...]  # of INPUTS, those that the outputs depend on
    size: tuple[int, int] | None  # H, W; None: any
    batch: int | None  # None: any
    roundings: Mapping[str, Rounding]


class Detections(nn.Module):
    """A detector with two tensors for outputs: logits (B, Q, C) and pred_boxes (B, Q, 4) cxcywh in 0..1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits and boxes; `pixel_mask` is 1 where a pixel is the image's."""
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return outputs.logits, outputs.pred_boxes


@torch.no_grad()
def exported(
    model: nn.Module,
    size: tuple[int, int],
    *,
    mask: bool = True,
    batch: int | None = 1,
    any_size: bool = False,
) -> Program:
    """The program of a float or fake-quant model for images of `size` (H, W); the model is left as it was.

    `any_size`: for images of other sizes too. `batch` is the number of images, None: any. `mask` asks for a
    pixel_mask input, which is there if any output depends on it. Raises ExportError where the model cannot be
    followed, or has quantizers that no integer model has.
    """
    _check_deployable(model)
    program = _export(model, size, mask, batch, any_size)
    _drop_checks(program.graph_module)
    read = {node.name: _is_read(node) for node in program.graph.nodes if node.name in INPUTS}
    if not read.get("pixel_mask", True):
        return exported(model, size, mask=False, batch=batch, any_size=any_size)
    return Program(
        exported=program,
        inputs=tuple(name for name in INPUTS if read.get(name)),
        size=None if any_size else size,
        batch=batch,
        roundings=dict(_roundings(program)),
    )


def _check_deployable(model: nn.Module) -> None:
    free = [path for path, each in quantizers(model).items() if each.enabled and has_free_offset(each.format)]
    if free:
        raise ExportError(
            f"{', '.join(free[:6])}: the option free_offset has no integer zero point, so this model stays a "
            "fake-quant model; train it with free_offset: false"
        )


def _export(
    model: nn.Module, size: tuple[int, int], mask: bool, batch: int | None, any_size: bool
) -> ExportedProgram:
    images = batch or 2  # a size of 1 would be taken for a constant
    weight = next(model.parameters())
    given = {"pixel_values": weight.new_zeros(images, 3, *size)}
    whole = torch.ones(images, *size, dtype=torch.int64, device=weight.device)
    wrapped = Detections(model)
    with undisturbed(wrapped), symbolic_lengths(model), known_grids(model):
        wrapped.eval()
        try:
            if mask and _mask_matters(wrapped, whole[:1], weight.dtype):
                given["pixel_mask"] = whole
            free = _free(tuple(given), batch, any_size)
            return torch.export.export(wrapped, (), given, dynamic_shapes=free, strict=False)
        except Exception as error:
            raise ExportError(_reason(size, batch, any_size, error)) from error


def _mask_matters(model: Detections, whole: Tensor, dtype: torch.dtype) -> bool:
    """Whether another mask gives other logits or boxes, on one image of noise, without quantizers.

    An export that turns out not to read its mask would have to be made again, which takes as long.
    """
    noise = torch.randn(1, 3, *whole.shape[1:], generator=torch.Generator().manual_seed(0))
    pixels = noise.to(device=whole.device, dtype=dtype)
    half = whole.clone()
    half[..., half.shape[-1] // 2 :] = 0
    on = [each for each in quantizers(model).values() if each.enabled]
    try:
        for quantizer in on:
            quantizer.enabled = False
        pairs = zip(model(pixels, whole), model(pixels, half), strict=True)
        return any(not torch.equal(one, other) for one, other in pairs)
    finally:
        for quantizer in on:
            quantizer.enabled = True


def _free(names: tuple[str, ...], batch: int | None, any_size: bool) -> dict[str, dict[int, Any]] | None:
    """What `dynamic_shapes` of torch.export wants: of each input the dimensions that are free."""
    images, sides = Dim("batch"), [Dim(name, min=SMALLEST) for name in ("height", "width")]
    free: dict[str, dict[int, Any]] = {name: {} for name in names}
    for name, own in free.items():
        if batch is None:
            own[0] = images
        if any_size:
            own.update(zip(SIDES[name], sides, strict=True))
    return free if any(free.values()) else None


@contextmanager
def symbolic_lengths(model: nn.Module) -> Iterator[None]:
    """Let `len` of a tensor be a free size in the code of the model: Python's own `len` makes it a number."""
    module: Any = sys.modules[type(model).__module__]
    module.len = lambda value: value.shape[0] if isinstance(value, Tensor) else len(value)
    try:
        yield
    finally:
        del module.len


@contextmanager
def known_grids(model: nn.Module) -> Iterator[None]:
    """Let quantizers give the grid that they have as constants, where it is not made from what they see."""
    known = [each for each in quantizers(model).values() if type(each).grid_for is FakeQuantizer.grid_for]
    for quantizer in known:
        vars(quantizer)["grid_for"] = partial(_always, quantizer.grid())
    try:
        yield
    finally:
        for quantizer in known:
            del vars(quantizer)["grid_for"]


def _always(grid: Grid, _: Tensor) -> Grid:
    return grid


def _reason(size: tuple[int, int], batch: int | None, any_size: bool, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    if any_size:
        return (
            "--size any: the code of this model makes constants of the sizes of its maps, so a file has one "
            f"size: --size HxW (torch.export: {first.partition('!')[0]})"
        )
    way_out = "try another --size" if batch else "export it for a fixed number of images"
    return f"torch.export cannot follow the model at {size[0]}x{size[1]} pixels: {first}; {way_out}"


def _drop_checks(module: fx.GraphModule) -> None:
    """Leave out what only checks sizes and values: it computes nothing, and no runtime knows it."""
    for node in list(module.graph.nodes):
        if node.target in _CHECKS:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=_has_effect)
    module.recompile()


def _is_read(given: fx.Node) -> bool:
    """Whether more than the size of an input is used."""
    return any(user.target is not aten.sym_size.int for user in given.users)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does more than give a value: it is an end of the graph, or writes into a tensor."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema is not None and schema.is_mutable)


def _roundings(program: ExportedProgram) -> Iterator[tuple[str, Rounding]]:
    """The roundings by their key; a quantizer that is called again has `:1`, `:2`.. after its path."""
    constants = Constants(program.graph, dict(owned(program)))
    calls: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target is not FAKE_QUANTIZE:
            continue
        x, step, zero, qmin, qmax, axis, path = node.args
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}:{count}" if count else path
        node.update_arg(6, key)
        if not constants.has(step) or not constants.has(zero):
            raise ExportError(
                f"quantizer {path}: its step depends on the image, which no integer kernel can use; "
                "grid_for must not depend on what it is given, but for a weight"
            )
        grid = Grid(step=constants(step), zero=constants(zero), qmin=qmin, qmax=qmax, shifted=False)
        yield key, Rounding(grid=grid, axis=axis, constant=constants(x) if constants.has(x) else None)


def owned(program: ExportedProgram) -> Iterator[tuple[fx.Node, Tensor]]:
    """Each placeholder of a parameter, buffer or constant with its tensor."""
    tensors = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    targets = {spec.arg.name: spec.target for spec in specs if spec.target is not None}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            yield node, tensors[str(targets[node.name])].detach()
