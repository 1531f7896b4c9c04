"""What an exported file says of itself: one JSON string under the key `qdetr`, for every runtime alike."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """All that is needed to give a file images and to read its outputs, and where it came from."""

    schema: int = SCHEMA
    family: str
    class_names: dict[int, str]  # model class index -> name
    processor: dict[str, Any]  # preprocessor_config.json, as Processor.to_config() gives it
    size: tuple[int, int] | None  # (H, W) of every image; None: any
    recipe: dict[str, Any] | None  # None: a float model
    source: str  # the name of the folder that it was exported from
    versions: dict[str, str]
    portable: bool = False  # whether no sum of products overflows on processors without VNNI

    @property
    def quantized(self) -> bool:
        """True for the export of a fake-quant model."""
        return self.recipe is not None

    def to_json(self) -> str:
        """As the file has it, on one line."""
        names = {str(index): name for index, name in self.class_names.items()}
        return json.dumps({**asdict(self), "class_names": names}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """The inverse of `to_json`. Raises ValueError that says what is wrong."""
        content = json.loads(text)
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, Mapping) else None
            raise ValueError(f"schema {found!r}; this qdetr reads schema {SCHEMA}")
        wanted = {field.name for field in fields(cls)}
        content = {"portable": False, **content}  # what was written before there were portable files
        if wanted != set(content):
            lacking, strange = sorted(wanted - set(content)), sorted(set(content) - wanted)
            raise ValueError(f"missing keys {lacking}, unknown keys {strange}")
        wrong = [name for name, kinds in _KINDS.items() if not isinstance(content[name], kinds)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: of the wrong type")
        names = {int(index): str(name) for index, name in content["class_names"].items()}
        return cls(**{**content, "class_names": names, "size": _size(content["size"])})


_KINDS: dict[str, tuple[type, ...]] = {  # as JSON has them
    "family": (str,),
    "class_names": (dict,),
    "processor": (dict,),
    "size": (list, type(None)),
    "recipe": (dict, type(None)),
    "source": (str,),
    "versions": (dict,),
    "portable": (bool,),
}


def _size(sides: list[Any] | None) -> tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size {sides} is not a height and a width")
    return sides[0], sides[1]
