"""The words of an original file and those of transformers: tensors by name, renamed by tables."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from qdetr_cli.coco_names import COCO_91
from qdetr_cli.errors import CheckpointError

Renames = tuple[tuple[str, str], ...]  # (pattern, replacement), applied in this order
COCO_80 = dict(enumerate(name for name in COCO_91.values() if name != "N/A"))


class State(dict[str, Tensor]):
    """Tensors by name. One that is asked for and not there raises CheckpointError."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.path}: {name} is missing, from which the structure would be read")

    def rows(self, name: str) -> int:
        """The length of the tensor's first axis: outputs of a layer, entries of an embedding."""
        return self[name].shape[0]

    def count(self, pattern: str) -> int:
        """How many values the first group of `pattern` takes at the start of the names: layers, blocks."""
        return len({found[1] for name in self if (found := re.match(pattern, name))})

    def without(self, pattern: str) -> "State":
        """The tensors whose name does not match `pattern`."""
        return State(self.path, ((name, each) for name, each in self.items() if not re.search(pattern, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalFile:
    """What was found in a file, in its own words."""

    state: State
    args: Mapping[str, Any] = field(default_factory=dict)  # what a training run was called with
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the user says; None: nothing

    def fail(self, what: str) -> CheckpointError:
        """The error that names the file."""
        return CheckpointError(f"{self.state.path}: {what}")

    def settled(
        self, said: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """(every setting: as the file says, else as the user, else as published; a note on the last kind).

        `said` holds None for what the file leaves open. Raises CheckpointError where user and file differ.
        """
        chosen: dict[str, Any] = {}
        assumed = []
        for name, default in defaults.items():
            file, user = said.get(name), self.settings.get(name)
            if file is not None and user is not None and file != user:
                raise self.fail(f"was trained with {name} {file}; {name} {user} contradicts it")
            if file is None and user is None:
                assumed.append(f"{name} {default}")
            chosen[name] = next(value for value in (file, user, default) if value is not None)
        if not assumed:
            return chosen, ()
        return chosen, (f"the file does not say {_and(assumed)}: assumed, as in the published models",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What an original file holds, in the words of transformers."""

    config: dict[str, Any]
    state: Mapping[str, Tensor]  # in-memory names
    notes: tuple[str, ...] = ()  # what was assumed or left out
    processor: dict[str, Any] | None = None  # as preprocessor_config.json; None: the family's fallback


def rename(state: State, renames: Renames) -> State:
    """The state under the names of transformers; packed attention projections come out as q, k and v.

    Raises CheckpointError if two tensors get one name and are not equal.
    """
    renamed = State(state.path)
    for original, tensor in state.items():
        whole = original
        for pattern, replacement in renames:
            whole = re.sub(pattern, replacement, whole)
        for name, part in _unpacked(whole, tensor):
            if name in renamed and not equal(renamed[name], part):
                raise CheckpointError(f"{state.path}: holds two tensors for {name}, one is {original}")
            renamed[name] = part
    return renamed


def labels(names: Mapping[int, str]) -> dict[str, Any]:
    """The config's two tables of class names."""
    return {"id2label": dict(names), "label2id": {name: index for index, name in names.items()}}


def class_names(classes: int) -> dict[int, str]:
    """COCO's names for heads of 91 (category ids) and 80 (in a row) classes, else numbers."""
    known = {len(COCO_91): COCO_91, len(COCO_80): COCO_80}
    return known.get(classes, {index: f"class {index}" for index in range(classes)})


def _unpacked(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if ".in_proj_" not in name:
        return [(name, tensor)]
    thirds = zip("qkv", tensor.chunk(3), strict=True)  # rows q, k, v: (3D, D) or (3D,)
    return [(name.replace(".in_proj_", f".{letter}_proj."), third.clone()) for letter, third in thirds]


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
