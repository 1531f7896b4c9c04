"""Packed weights: integers at their width in a safetensors file, and back to the last bit.

A weight of b bits stands in the file under its own name as bytes (U8, one dimension): the stream of its codes
c = q + 2^(b-1), in the order of the weight's elements (C order), b bits each, the lowest bit of a code and of
a byte first, and zeros up to a whole byte at the end. The metadata `packed` is JSON,

    {"<path>.weight": {"bits": 4, "shape": [256, 64, 1, 1], "axis": 0}, ...}

and the weight is q * step in float32, with the steps "<path>.weight_quantizer.step": one for each index along
`axis`, or a single one (null). Where there is "mid_rise": true it is (q + 1/2) * step. All other tensors are
stored as they are.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdetr_cli.errors import CheckpointError
from qdetr_cli.fake_quant import Grid
from qdetr_cli.layers import Quantized
from qdetr_cli.manifest import (
    WEIGHTS,
    Manifest,
    Stored,
    listed,
    put_weights,
    read_file,
    unshared,
    write_folder,
)
from qdetr_cli.plan import ModulePlan, Plan, SlotPlan
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.ranges import MID_RISE_ZERO
from qdetr_cli.reading import parse_json

PACKED = "packed"  # the key of the metadata
Bytes = NDArray[np.uint8]
_WORD = np.dtype("<u8")
_STEP, _QUANTIZER = "_quantizer.step", "_quantizer."  # after a weight's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one weight is stored: bits of a code, shape, and the dimension that owns the steps."""

    bits: int
    shape: tuple[int, ...]
    axis: int | None
    mid_rise: bool = False

    @property
    def values(self) -> int:
        """How many codes there are."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return -(-self.values * self.bits // 8)


def pack(codes: Bytes, bits: int) -> Bytes:
    """The bytes of a stream of codes (n,), each in 0..2^bits-1."""
    count = codes.size
    groups = np.zeros((-(-count // 8), 8), dtype=_WORD)  # eight codes take `bits` bytes, and fit into a word
    groups.reshape(-1)[:count] = codes
    words = np.bitwise_or.reduce(groups << _places(bits), axis=1, keepdims=True)
    return words.view(np.uint8)[:, :bits].reshape(-1)[: -(-count * bits // 8)]


def unpack(stream: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of a stream, (count,)."""
    groups = np.zeros((-(-count // 8), 8), dtype=np.uint8)
    padded = np.zeros(len(groups) * bits, dtype=np.uint8)
    padded[: stream.size] = stream
    groups[:, :bits] = padded.reshape(-1, bits)
    codes = (groups.view(_WORD) >> _places(bits)) & _WORD.type((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(-1)[:count]


def _places(bits: int) -> NDArray[np.uint64]:
    """The lowest bit of each of eight codes in a word."""
    return np.arange(0, 8 * bits, bits, dtype=_WORD)


def write_packed(folder: Path, module: nn.Module, manifest: Manifest) -> None:
    """Write a fake-quant module as a packed folder, as a whole or not at all.

    `manifest` is that of the fake-quant model; in the packed one the weights' quantizers are `fixed`, since
    their steps belong to the integers. Raises CheckpointError where a weight is not what its grid says.
    """
    tensors, aliases = unshared(module.state_dict())
    layers = _packable(module, aliases)
    for name, layer in layers.items():
        stream, step = _packed(name, layer)
        own = [each for each in tensors if each.startswith(name + _QUANTIZER)]
        kept = tensors[name + "_quantizer.calibrated"]
        for each in own:
            del tensors[each]
        tensors |= {name: stream, name + _STEP: step, name + "_quantizer.calibrated": kept}
    packings = {name: _stated(_packing(layer)) for name, layer in layers.items()}
    plan = _fixed(Plan.from_dict(manifest.plan), {name.removesuffix(".weight") for name in layers})
    stored = Stored(
        tensors=tensors,
        aliases={alias: name for alias, name in aliases.items() if name in tensors},
        metadata={PACKED: json.dumps(packings, separators=(",", ":"))},
    )
    write_folder(folder, stored, replace(manifest, kind="packed", plan=plan.to_dict()))


def load_packed(folder: Path, module: nn.Module) -> None:
    """Put a packed folder's tensors into `module`, whose structure is that of its manifest.

    Raises CheckpointError that lists what does not fit; it then changes nothing.
    """
    path = folder / WEIGHTS
    stored = read_file(path)
    packings = read_packings(path, stored.metadata)
    layers = {f"{name}.weight": each for name, each in module.named_modules() if isinstance(each, Quantized)}
    faults = [
        fault
        for name, packing in packings.items()
        if (fault := _misfit(name, packing, layers.get(name), stored.tensors))
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit the model: {listed(faults)}")
    floats = {name: _unpacked(name, packing, stored.tensors) for name, packing in packings.items()}
    put_weights(path, replace(stored, tensors=stored.tensors | floats).shared(), module)


def read_packings(path: Path, metadata: Mapping[str, str]) -> dict[str, Packing]:
    """How each packed weight of a file is stored, by its name; {} for a file without any."""
    try:
        found = parse_json(metadata.get(PACKED, "{}"))
        return {str(name): _read_packing(**entry) for name, entry in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata {PACKED!r} is damaged ({error})") from error


def _stated(packing: Packing) -> dict[str, object]:
    return {key: value for key, value in asdict(packing).items() if value is not False}


def _read_packing(*, bits: object, shape: object, axis: object, mid_rise: object = False) -> Packing:
    """Raises ValueError for what no weight has."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits!r} is not 2 to 8")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"shape: {shape!r} is no list of whole numbers")
    if axis is not None and (type(axis) is not int or not 0 <= axis < len(shape)):
        raise ValueError(f"axis: {axis!r} is no dimension of {shape}")
    if type(mid_rise) is not bool:
        raise ValueError(f"mid_rise: {mid_rise!r} is not true or false")
    return Packing(bits=bits, shape=tuple(shape), axis=axis, mid_rise=mid_rise)


def _packable(module: nn.Module, aliases: Mapping[str, str]) -> dict[str, Quantized]:
    """The layers whose weight is quantized, by its name; one that something else reads too stays float."""
    readers: dict[str, set[int]] = {}
    for alias, name in aliases.items():
        readers.setdefault(name, set()).add(id(module.get_submodule(alias.rpartition(".")[0])))
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, Quantized) and layer.weight_quantizer is not None:
            name = f"{path}.weight"
            if name not in aliases and readers.get(name, set()) <= {id(layer)}:
                found[name] = layer
    return found


def _packing(layer: Quantized) -> Packing:
    quantizer = _quantizer(layer)
    return Packing(
        bits=quantizer.format.bits,
        shape=tuple(layer.weight.shape),
        axis=quantizer.axis,
        mid_rise=quantizer.format.mid_rise,
    )


@torch.no_grad()
def _packed(name: str, layer: Quantized) -> tuple[Tensor, Tensor]:
    """(the stream of codes, the steps) of a layer's weight."""
    quantizer, weight = copy.deepcopy(_quantizer(layer)).cpu(), layer.weight.detach().cpu()
    grid = quantizer.grid_for(weight)
    integers = grid.integers(weight, quantizer.axis)
    values = grid.dequantize(integers, quantizer.axis)
    offset = grid.zero is not None and not quantizer.format.mid_rise
    if offset or not torch.equal(values, quantizer.fake_quantize(weight)):
        raise CheckpointError(
            f"{name}: the quantizer {quantizer.format.quantizer} does not round it to the grid that it "
            "states, so integers cannot stand for it"
        )
    codes = (integers - grid.qmin).to(torch.uint8).flatten().numpy()
    return torch.from_numpy(pack(codes, quantizer.format.bits)), grid.step.clone()


def _misfit(
    name: str, packing: Packing, layer: Quantized | None, tensors: Mapping[str, Tensor]
) -> str | None:
    """What keeps a packed weight from being put into its layer, None where it fits."""
    if layer is None or layer.weight_quantizer is None:
        return f"{name} is packed, but is no quantized weight"
    if packing != _packing(layer):
        return f"{name} is {_described(packing)} for {_described(_packing(layer))}"
    stream, step = tensors.get(name), tensors.get(name + _STEP)
    if stream is None or stream.dtype != torch.uint8 or stream.shape != (packing.bytes,):
        return f"{name} is not {packing.bytes} bytes"
    if step is None or step.dtype != torch.float32 or step.shape != (layer.weight_quantizer.channels,):
        return f"{name}{_STEP} is not {layer.weight_quantizer.channels} float32 numbers"
    return None


def _described(packing: Packing) -> str:
    kind = "mid-rise bits" if packing.mid_rise else "bits"
    return f"{packing.bits} {kind} {packing.shape} with steps along {packing.axis}"


def _unpacked(name: str, packing: Packing, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of a packed one: what its grid makes of the integers, float32."""
    half = 1 << (packing.bits - 1)
    codes = torch.from_numpy(unpack(tensors[name].numpy(), packing.bits, packing.values))
    step, shifted = tensors[name + _STEP], packing.mid_rise
    zero = torch.full_like(step, MID_RISE_ZERO) if shifted else None
    grid = Grid(step=step, zero=zero, qmin=-half, qmax=half - 1, shifted=shifted)
    return grid.dequantize(codes.reshape(packing.shape).float().sub_(half), packing.axis)


def _quantizer(layer: Quantized) -> FakeQuantizer:
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer


def _fixed(plan: Plan, paths: set[str]) -> Plan:
    """The plan with the weights of these modules on fixed grids."""
    return replace(
        plan, modules=tuple(_fixed_weight(each) if each.path in paths else each for each in plan.modules)
    )


def _fixed_weight(module: ModulePlan) -> ModulePlan:
    return replace(module, slots=tuple(_fixed_slot(slot) for slot in module.slots))


def _fixed_slot(slot: SlotPlan) -> SlotPlan:
    if slot.slot != "weight" or slot.format is None:
        return slot
    plain = replace(slot.format, quantizer_options={}, init="minmax", init_options={})  # needs no plugin
    return replace(slot, format=replace(plain, quantizer="fixed"))
