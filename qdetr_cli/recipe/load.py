"""Reading recipes: extends, overrides, format names, types. All faults come in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qdetr_cli.recipe.faults import Fault, describe, raise_faults, unknown_key
from qdetr_cli.recipe.names import rules_of, without_names
from qdetr_cli.recipe.nodes import Node, compose, merge, tree
from qdetr_cli.recipe.overrides import overridden
from qdetr_cli.recipe.schema import SLOT_FAULTS, Recipe
from qdetr_cli.recipe.shelf import SUFFIXES, find_recipe, recipe_folder, unknown_recipe


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a file, with what it extends and with `key=value` overrides applied.

    Parents come first: rules and plugins are joined, mappings are merged key by key, except that a ladder, an
    `init` or a `quantizer` replaces the inherited one. Rules are numbered in the joined list, here and in
    every message. Raises a RecipeError that lists every fault with file, line and dotted path.
    """
    faults: list[Fault] = []
    roots = _lineage(find_recipe(name_or_path), faults, (), set())
    found = [root for root in roots if root is not None]
    if len(found) < len(roots):  # faults that follow from what could not be read would only mislead
        raise_faults(name_or_path, faults)
    root = overridden(reduce(merge, found), overrides, faults)
    return _typed(root, faults, name_or_path)


def recipe_from_dict(values: Mapping[str, Any], source: str) -> Recipe:
    """The recipe that `Recipe.to_dict` wrote; `source` names the manifest in messages."""
    return _typed(tree(_renewed(values), source), [], source)


def _renewed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values without what older versions wrote: `quantizer_lr: null`, for the rate of the weights."""
    train = values.get("train")
    if not isinstance(train, Mapping) or train.get("quantizer_lr", 0) is not None:
        return values
    return {**values, "train": {name: each for name, each in train.items() if name != "quantizer_lr"}}


def _lineage(path: Path, faults: list[Fault], chain: tuple[Path, ...], seen: set[Path]) -> list[Node | None]:
    """The roots of a file and of what it extends, parents first, each once; None for what cannot be read."""
    root, chain = _read(path, faults), (*chain, path.resolve())
    seen.add(path.resolve())
    roots: list[Node | None] = []
    for entry in _entries(root.child("extends") if root else None):
        parent = _parent(entry, path)
        if parent is None or parent.resolve() in chain:
            faults.append(entry.fault("extends", _no_parent(entry, parent, chain)))
            roots.append(None)
        elif parent.resolve() not in seen:
            roots += _lineage(parent, faults, chain, seen)
    return [*roots, root]


def _entries(node: Node | None) -> tuple[Node, ...]:
    """The items of a list, or the one scalar in place of a list."""
    if node is None:
        return ()
    return node.value if isinstance(node.value, tuple) else (node,)


def _parent(entry: Node, child: Path) -> Path | None:
    """The file that `extends: entry` means: beside the child if it ends in .yaml, else a shipped name."""
    name = str(entry.plain())
    path = child.parent / name if name.endswith(SUFFIXES) else recipe_folder() / f"{name}.yaml"
    return path if path.is_file() else None


def _no_parent(entry: Node, parent: Path | None, chain: tuple[Path, ...]) -> str:
    if parent is None:
        return unknown_recipe(str(entry.plain()))
    return f"a recipe cannot extend itself: {' -> '.join(path.name for path in (*chain, parent))}"


def _read(path: Path, faults: list[Fault]) -> Node | None:
    shown = path.name if path.parent == recipe_folder() else str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(Fault(source=shown, line=0, path="", message=f"cannot be read as text ({error})"))
        return None
    root = compose(text, shown, faults)
    if root is not None and not isinstance(root.value, dict):
        faults.append(root.fault("", "is not a recipe; a recipe begins with schema: 1"))
        return None
    return _stated(root, path.parent) if root else None


def _stated(root: Node, folder: Path) -> Node:
    """The root without sections that hold nothing; plugin folders are counted from the recipe's own."""
    assert isinstance(root.value, dict)
    sections = {
        key: node
        for key, node in root.value.items()
        if node.value is not None or key not in Recipe.model_fields
    }
    if "plugins" in sections:
        entries = _entries(sections["plugins"])
        if all(isinstance(entry.value, str) for entry in entries):
            found = tuple(Node(str(folder / str(entry.value)), entry.source, entry.line) for entry in entries)
            sections["plugins"] = Node(found, root.source, sections["plugins"].line)
    return Node(sections, root.source, root.line)


def _typed(root: Node, faults: list[Fault], name: str) -> Recipe:
    root, by_name = without_names(root, faults)
    values = _with_places(root, faults)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        faults += _faults_of(error, root, by_name)
    raise_faults(name, faults)
    return recipe


def _with_places(root: Node, faults: list[Fault]) -> Any:
    """Plain values, each rule with the file and line where it is written."""
    values = root.plain()
    for index, node in enumerate(rules_of(root)):
        rule = values["rules"][index]
        if isinstance(rule, dict):
            for key in {"line", "source"} & rule.keys():
                faults.append(
                    node.at([key]).fault(f"rules.{index}.{key}", unknown_key(("rules", index, key)))
                )
            rule.update(line=node.line, source=Path(node.source).name)
    return values


def _faults_of(error: ValidationError, root: Node, by_name: set[tuple[int, str]]) -> Iterable[Fault]:
    for item in error.errors(include_url=False):
        loc = _written(item["loc"])
        if loc[:1] == ("rules",) and loc[1:3] in by_name and item["type"] not in SLOT_FAULTS:
            continue  # said once, at the format itself
        node = root.at(loc)
        yield node.fault(".".join(str(part) for part in loc), describe(item, node.plain()))


def _written(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path as the user writes it: a plugin's options stand beside its name."""
    before = ("", *loc)
    return tuple(
        key
        for key, parent in zip(loc, before, strict=False)
        if not (key == "options" and parent in ("init", "quantizer"))
    )
