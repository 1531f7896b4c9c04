"""qdetr's own checkpoints: a folder with `model.safetensors` (in-memory names) and `qdetr.json` (what it is).

`save_pretrained` renames modules and would lose scales, so tensors are written as the live model names them.
A tensor with several names (shared heads) is stored once; the file's metadata lists the other names.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdetr_cli.errors import CheckpointError
from qdetr_cli.runs import atomic_folder

MANIFEST = "qdetr.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
HARMLESS = "num_batches_tracked"  # a counter of live batch norms that frozen ones lack; it changes nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is needed to build the model again, and where it came from."""

    format: int = FORMAT
    kind: Literal["float", "fake-quant"]
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
        if content["kind"] not in ("float", "fake-quant"):
            raise ValueError(f"kind {content['kind']!r} is not float or fake-quant")
        names = {int(index): str(name) for index, name in content["class_names"].items()}
        return cls(**{**content, "class_names": names})


def is_qdetr_folder(path: str | Path) -> bool:
    """True for a folder that qdetr wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that qdetr wrote. Raises CheckpointError if there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); is this a qdetr folder?"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest of this qdetr: {error}") from error


def save_checkpoint(folder: Path, model: nn.Module, manifest: Manifest) -> None:
    """Write the folder as a whole or not at all; a folder that stood there is replaced."""
    tensors, aliases = _unshared(model.state_dict())
    text = json.dumps(manifest.to_dict(), indent=2, allow_nan=False)
    with atomic_folder(folder) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt", "aliases": json.dumps(aliases)})
        (draft / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the folder's tensors into `model`, bit for bit.

    Raises CheckpointError that lists every missing, unexpected and misshapen tensor; it then changes nothing.
    """
    stored = read_tensors(folder / WEIGHTS)
    own = model.state_dict()
    faults = differences(stored, own)
    if faults:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the model: " + "; ".join(faults))
    model.load_state_dict(stored, strict=False)  # not by hand: quantizers take note of being calibrated


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, shared ones under each of their names."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases: dict[str, str] = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({error}); copy or save it again"
        ) from error
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


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


def _unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
