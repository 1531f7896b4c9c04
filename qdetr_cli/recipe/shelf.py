"""The shipped recipes: found by name in the source tree and in an installed wheel."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from qdetr_cli.errors import RecipeError
from qdetr_cli.recipe.faults import near

SUFFIXES = (".yaml", ".yml")


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the installed package, else at the top of the source tree."""
    package = Path(str(files("qdetr_cli")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted. Fragments (`_base`) are for `extends` and not listed."""
    return tuple(sorted(path.stem for path in recipe_folder().glob("[!_]*.yaml")))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe or fragment."""
    path = recipe_folder() / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        raise RecipeError(unknown_recipe(name))
    return path


def find_recipe(name_or_path: str) -> Path:
    """The file that a user means by a name or a path."""
    if name_or_path.endswith(SUFFIXES) or name_or_path not in recipe_names():
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(unknown_recipe(name_or_path))
        return path
    return recipe_path(name_or_path)


def unknown_recipe(name: str) -> str:
    """What to say when neither a shipped recipe nor a file has this name."""
    names = recipe_names()
    return (
        f"{name}: no such recipe{near(name, names)}; shipped: {', '.join(names)}; or the path of a .yaml file"
    )


def recipe_text(name_or_path: str) -> str:
    """The text of a recipe as it is written, comments included."""
    return find_recipe(name_or_path).read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """The first line of a shipped recipe's header: what it is for."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")


def new_recipe(path: Path, base: str = "w4a4") -> Path:
    """Write a commented recipe that starts from `base` to `path`; a file that exists is refused."""
    written = find_recipe(base)
    if base not in recipe_names():
        base = os.path.relpath(written, path.parent)
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{path}: a recipe file ends in .yaml")
    text = _TEMPLATE.format(path=path, base=base)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: exists already; choose another name or remove it") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror})") from None
    return path


_TEMPLATE = """\
# What this recipe is for, in one line.
# Needs : a trained checkpoint, data in VOC or COCO form.
# Run   : qdetr finetune MODEL --recipe {path} --data DATA --out runs/new
# Check : qdetr recipe check {path}; qdetr inspect MODEL --recipe {path}
# Result: not measured yet
schema: 1
extends: {base}

# Rules follow those of {base} and win over them. A rule selects by role, path or op (all must hold) and
# sets slots: weight, input; in attention q, k, probs, v; of sums output. Bits: 2 to 8, or float.
rules:
  - {{role: encoder.attention, weight: {{bits: 8}}, input: {{bits: 8}}}}
  # - {{path: "*.encoder.layers.0.*", op: linear, weight: {{bits: 8}}}}
  # - {{role: decoder.cross_attention, op: [attention, deformable], probs: {{bits: 8}}}}
  # - {{role: box_head, keep: float}}

# Sections, each with what {base} says unless it is stated here.
# calibrate: {{images: 128, batch_size: 8}}
# train: {{epochs: 12, batch_size: 16, lr: 1e-4, backbone_lr: 1e-5}}
# distill: {{teacher: float, terms: {{logits: 1.0, boxes: 1.0}}}}
"""
