"""What a folder that qdetr wrote stores in how many bits, read from the header of its tensors alone."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from qdetr_cli.errors import CheckpointError
from qdetr_cli.manifest import MANIFEST, WEIGHTS
from qdetr_cli.packed import read_packings

# What safetensors calls a type -> (in words, bits of a value)
_TYPES = {"F32": ("float32", 32), "BOOL": ("true or false", 8), "I64": ("64-bit integers", 64)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """The tensors that are stored in one way."""

    kind: str  # "4-bit integers", "float32"
    bits: int
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Everything in a folder: rows by bits, and its files with their sizes in bytes."""

    rows: tuple[StoredAs, ...]
    files: dict[str, int]
    float_bytes: int  # of the same model with 4 bytes for each value, quantizers apart

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def storage_of(folder: Path) -> Storage:
    """What is stored in `folder`. Raises CheckpointError for a damaged file."""
    sums: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    float_bytes = 0
    for name, kind, bits, values, size in _tensors(folder / WEIGHTS):
        sums[bits, kind].append((values, size))
        float_bytes += 0 if "_quantizer." in name else 4 * values
    rows = tuple(
        StoredAs(kind=kind, bits=bits, tensors=len(found), values=values, bytes=size)
        for (bits, kind), found in sorted(sums.items())
        for values, size in [map(sum, zip(*found, strict=True))]
    )
    files = {name: (folder / name).stat().st_size for name in (WEIGHTS, MANIFEST)}
    return Storage(rows=rows, files=files, float_bytes=float_bytes)


def _tensors(path: Path) -> Iterator[tuple[str, str, int, int, int]]:
    """(name, kind in words, bits of a value, values, bytes) of each tensor."""
    try:
        with safe_open(path, framework="numpy") as file:
            packings = read_packings(path, file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: (each.get_dtype(), prod(each.get_shape())) for name, each in slices.items()}
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises many types
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
    for name, (dtype, values) in types.items():
        if name in packings:
            packing = packings[name]
            yield name, f"{packing.bits}-bit integers", packing.bits, packing.values, packing.bytes
        else:
            kind, bits = _TYPES.get(dtype, (dtype, int("".join(filter(str.isdigit, dtype)) or 8)))
            yield name, kind, bits, values, values * bits // 8
