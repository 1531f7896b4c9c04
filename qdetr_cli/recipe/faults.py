"""Faults of a recipe: where, what, and the valid choices; every one of them in one error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from qdetr_cli.errors import RecipeError
from qdetr_cli.recipe.formats import SLOTS, Format
from qdetr_cli.recipe.schema import (
    Augment,
    Calibrate,
    Distill,
    Export,
    OneToMany,
    Oscillation,
    Recipe,
    Rule,
    Stage,
    Train,
)

_SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("calibrate",): Calibrate,
    ("train",): Train,
    ("train", "augment"): Augment,
    ("train", "stages", "*"): Stage,
    ("train", "oscillation"): Oscillation,
    ("train", "one_to_many"): OneToMany,
    ("distill",): Distill,
    ("export",): Export,
    ("rules", "*"): Rule,
    ("formats", "*"): Format,
    **{("rules", "*", slot): Format for slot in SLOTS},
}
_TYPES = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "string_type": "is not a text",
    "model_type": "is not a section (key: value)",
    "model_attributes_type": "is not a section (key: value)",
    "tuple_type": "is not a list",
    "too_long": "has too many entries",
    "dict_type": "is not a section (key: value)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake: `w4a4.yaml:12: rules.2.weight.bits: 5.5 is not one of 2, 3, ...`."""

    source: str  # a file, or the flag that did it
    line: int  # 0 where there are no lines
    path: str  # dotted; "" for the whole
    message: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return ": ".join(part for part in (place, self.path, self.message) if part)


def raise_faults(name: str, faults: Iterable[Fault]) -> None:
    """Nothing if there are no faults; else a RecipeError that lists them all, in the order of the file."""
    unique = list(dict.fromkeys(sorted(faults, key=lambda fault: (fault.source, fault.line))))
    if len(unique) == 1:
        raise RecipeError(str(unique[0]))
    if unique:
        lines = "\n".join(f"  {fault}" for fault in unique)
        raise RecipeError(f"{len(unique)} faults in {name}:\n{lines}")


def near(word: str, choices: Iterable[str]) -> str:
    """`; did you mean x?` for the closest choice, or "" when none is close."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def describe(error: ErrorDetails, value: object) -> str:
    """One of pydantic's errors about `value` in our words, with the valid choices."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(error["loc"])
    if kind == "missing":
        return "is missing; write schema: 1" if error["loc"] == ("schema",) else "is missing"
    if kind == "literal_error":
        expected = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{_shown(value)} is not one of {expected}"
    if kind == "model_type" and error["loc"][-1] in SLOTS:
        return f"{_shown(value)} is not a format; write {{bits: 8}}, or the name of one from formats"
    if kind in _TYPES:
        return f"{_shown(value)} {_TYPES[kind]}"
    message = error["msg"]
    return message.replace("Input", _shown(value), 1) if message.startswith("Input") else message


def unknown_key(loc: Sequence[str | int]) -> str:
    """What to say about a key that its section does not have, with the near miss and the valid keys."""
    key = str(loc[-1])
    for pattern, model in _SECTIONS.items():
        if len(pattern) == len(loc) - 1 and all(
            p in ("*", k) for p, k in zip(pattern, loc[:-1], strict=True)
        ):
            keys = [field.alias or name for name, field in model.model_fields.items() if not field.exclude]
            return f"unknown key{near(key, keys)}; valid keys: {', '.join(keys)}"
    return "unknown key"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = str(value) or '""'
    return text if len(text) <= 60 else f"{text[:57]}..."
