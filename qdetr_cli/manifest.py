"""qdetr's own checkpoints: a folder with `model.safetensors` (in-memory names) and `qdetr.json` (what it is).

`save_pretrained` renames modules and would lose scales, so tensors are written as the live model names them.
A tensor with several names (shared heads) is stored once; the file's metadata lists the other names.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdetr_cli.errors import CheckpointError
from qdetr_cli.reading import check_regular, parse_json, read_json
from qdetr_cli.runs import atomic_folder

MANIFEST = "qdetr.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
Kind = Literal["float", "fake-quant", "packed"]
_TYPES = {
    "family": str,
    "recipe": dict,
    "plan": dict,
    "facts": dict,
    "class_names": dict,
    "processor": dict,
    "config": dict,
    "source": str,
    "versions": dict,
    "metrics": dict | None,
}
HARMLESS = "num_batches_tracked"  # a counter of live batch norms that frozen ones lack; it changes nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is needed to build the model again, and where it came from."""

    format: int = FORMAT
    kind: Kind
    family: str
    recipe: dict[str, Any]
    plan: dict[str, Any]
    facts: dict[str, Any]
    class_names: dict[int, str]  # model class index -> name
    processor: dict[str, Any]  # preprocessor_config.json
    config: dict[str, Any]  # config.json of transformers
    source: str
    versions: dict[str, str]
    metrics: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with string keys."""
        names = {str(index): name for index, name in self.class_names.items()}
        return {**asdict(self), "class_names": names}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Manifest":
        """The inverse of `to_dict`. Raises ValueError that says what is wrong."""
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r}; this qdetr reads format {FORMAT}")
        wanted = {field.name for field in fields(cls)}
        if wanted != set(content):
            lacking, strange = sorted(wanted - set(content)), sorted(set(content) - wanted)
            raise ValueError(f"missing keys {lacking}, unknown keys {strange}")
        if content["kind"] not in get_args(Kind):
            raise ValueError(f"kind {content['kind']!r} is not float, fake-quant or packed")
        if strange := [key for key, kind in _TYPES.items() if not isinstance(content[key], kind)]:
            raise ValueError(f"{', '.join(strange)}: of another type than qdetr writes")
        names = {int(index): str(name) for index, name in content["class_names"].items()}
        return cls(**{**content, "class_names": names})


def is_qdetr_folder(path: str | Path) -> bool:
    """True for a folder that qdetr wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that qdetr wrote. Raises CheckpointError if there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.from_dict(read_json(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); is this a qdetr folder?"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest of this qdetr: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a safetensors file holds: tensors, other names of shared ones, and metadata of the file."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]  # other name -> name of its tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def shared(self) -> dict[str, Tensor]:
        """All tensors, shared ones under each of their names."""
        return self.tensors | {alias: self.tensors[name] for alias, name in self.aliases.items()}


def save_checkpoint(folder: Path, model: nn.Module, manifest: Manifest) -> None:
    """Write the folder as a whole or not at all; a folder that stood there is replaced."""
    tensors, aliases = unshared(model.state_dict())
    write_folder(folder, Stored(tensors=tensors, aliases=aliases), manifest)


def write_folder(folder: Path, stored: Stored, manifest: Manifest) -> None:
    """Write tensors and manifest as a whole or not at all; a folder that stood there is replaced."""
    indent = None if manifest.kind == "packed" else 2  # what is packed is to be small
    text = json.dumps(manifest.to_dict(), indent=indent, allow_nan=False)
    metadata = {"format": "pt", "aliases": json.dumps(stored.aliases), **stored.metadata}
    with atomic_folder(folder) as draft:
        save_file(stored.tensors, draft / WEIGHTS, metadata=metadata)
        (draft / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the folder's tensors into `model`, bit for bit; see `put_weights`."""
    put_weights(folder / WEIGHTS, read_tensors(folder / WEIGHTS), model)


def put_weights(path: Path, stored: Mapping[str, Tensor], model: nn.Module) -> None:
    """Put the tensors that the file `path` holds into `model`.

    Raises CheckpointError that lists every missing, unexpected and misshapen tensor; it then changes nothing.
    """
    faults = differences(stored, model.state_dict())
    if faults:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(faults))
    model.load_state_dict(stored, strict=False)  # not by hand: quantizers take note of being calibrated


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, shared ones under each of their names."""
    return read_file(path).shared()


def read_file(path: Path) -> Stored:
    """All of a safetensors file. Raises CheckpointError for a damaged one."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Stored(
            tensors=tensors, aliases=_aliases(metadata.pop("aliases", "{}"), tensors), metadata=metadata
        )
    except Exception as error:  # safetensors and torch raise many types here
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}); copy or save it again"
        ) from error


def _aliases(text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The other names of shared tensors. Raises ValueError where they name what is not there."""
    aliases = parse_json(text)
    if not isinstance(aliases, dict) or not all(name in tensors for name in aliases.values()):
        raise ValueError("its metadata 'aliases' names tensors that it does not hold")
    if both := sorted(tensors.keys() & aliases):
        raise ValueError(f"{listed(both)}: stands there twice, as a tensor and as another name of one")
    return aliases


def differences(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps `stored` from fitting a model with the state `own`: one line for each kind of fault."""
    missing = [name for name in own if name not in stored and not name.endswith(HARMLESS)]
    unexpected = [name for name in stored if name not in own and not name.endswith(HARMLESS)]
    misshapen = [
        f"{name} {_kind(stored[name])} for {_kind(tensor)}"
        for name, tensor in own.items()
        if name in stored and _kind(stored[name]) != _kind(tensor)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or type": misshapen}
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]


def listed(names: list[str], most: int = 12) -> str:
    """The names, comma separated, the first `most` of them and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by first name, alias -> first name); each is contiguous, on the CPU, in its own storage."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases
