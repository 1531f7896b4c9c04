"""YAML as a tree that remembers where each value is written. Nothing is constructed but plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qdetr_cli.recipe.faults import Fault

Scalar = None | bool | int | float | str
# Stated anew these replace what was inherited; nothing is mixed in.
_ALONE = ("ladder", "init", "quantizer", "terms")
_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place. `line` is that of the key or list item, 0 where there are no lines."""

    value: Scalar | dict[str, Node] | tuple[Node, ...]
    source: str
    line: int

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The node under a key or list index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, tuple) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def at(self, path: Sequence[str | int]) -> Node:
        """The node at `path`, or the deepest one on the way there."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node

    def fault(self, path: str, message: str) -> Fault:
        """A fault at this place."""
        return Fault(source=self.source, line=self.line, path=path, message=message)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a number, `no` and `off` are texts."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]{1,18}"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def compose(text: str, source: str, faults: list[Fault]) -> Node | None:
    """The tree of a YAML text, or None where it is no YAML. Duplicate keys, anchors and tags are faults."""
    try:
        root = None if _is_foreign(text, source, faults) else yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        faults.append(Fault(source=source, line=line, path="", message=f"not YAML: {error.problem}"))
        return None
    except yaml.YAMLError as error:
        faults.append(Fault(source=source, line=0, path="", message=f"not YAML: {error}"))
        return None
    return None if root is None else _node(root, 1, (), source, faults)


def _is_foreign(text: str, source: str, faults: list[Fault]) -> bool:
    """True, with a fault, for what a recipe cannot hold: nothing at all, anchors, depth without end."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            _add(faults, source, event, "anchors and aliases are no part of recipes; use formats or extends")
            return True
        if depth > _DEPTH:
            _add(faults, source, event, "is nested too deep for a recipe")
            return True
    if not nodes:
        faults.append(
            Fault(source=source, line=0, path="", message="is empty; a recipe begins with schema: 1")
        )
    return not nodes


def _line(at: yaml.Event | yaml.Node) -> int:
    return at.start_mark.line + 1 if at.start_mark else 0


def _add(faults: list[Fault], source: str, at: yaml.Event | yaml.Node, message: str, path: str = "") -> None:
    faults.append(Fault(source=source, line=_line(at), path=path, message=message))


def _node(raw: yaml.Node, line: int, path: tuple[str, ...], source: str, faults: list[Fault]) -> Node:
    if isinstance(raw, yaml.MappingNode):
        return Node(_mapping(raw, path, source, faults), source, line)
    if isinstance(raw, yaml.SequenceNode):
        items = (
            _node(item, _line(item), (*path, str(i)), source, faults) for i, item in enumerate(raw.value)
        )
        return Node(tuple(items), source, line)
    return Node(_scalar(raw, path, source, faults), source, line)


def _mapping(
    raw: yaml.MappingNode, path: tuple[str, ...], source: str, faults: list[Fault]
) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for key, value in raw.value:
        line = _line(key)
        if not isinstance(key, yaml.ScalarNode):
            _add(faults, source, key, "a key must be a word", ".".join(path))
            continue
        below = (*path, str(key.value))
        if key.value in found:
            lines = f"set twice, on lines {found[key.value].line} and {line}; keep one"
            _add(faults, source, key, lines, ".".join(below))
            continue
        found[key.value] = _node(value, line, below, source, faults)
    return found


def _scalar(raw: yaml.Node, path: tuple[str, ...], source: str, faults: list[Fault]) -> Scalar:
    kind, text = raw.tag.removeprefix("tag:yaml.org,2002:"), str(raw.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    if kind != "str":
        _add(faults, source, raw, f"the tag {raw.tag} is not part of recipes", ".".join(path))
    return text


def tree(value: Any, source: str) -> Node:
    """The node of plain values (from JSON), without lines."""
    if isinstance(value, Mapping):
        return Node({str(key): tree(item, source) for key, item in value.items()}, source, 0)
    if isinstance(value, list | tuple):
        return Node(tuple(tree(item, source) for item in value), source, 0)
    return Node(value, source, 0)


def merge(parent: Node, child: Node, path: tuple[str, ...] = ()) -> Node:
    """The child over the parent: mappings merge by key, rules and plugins are joined, else the child wins."""
    if (
        path in (("rules",), ("plugins",))
        and isinstance(parent.value, tuple)
        and isinstance(child.value, tuple)
    ):
        return Node(parent.value + child.value, child.source, child.line)
    alone = bool(path) and path[-1] in _ALONE
    if alone or not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = merge(merged[key], node, (*path, key)) if key in merged else node
    return Node(merged, child.source, child.line)


def replace(node: Node, key: str | int, child: Node) -> Node:
    """A copy of a mapping or list node with one entry set."""
    if isinstance(node.value, dict):
        return Node({**node.value, str(key): child}, node.source, node.line)
    assert isinstance(node.value, tuple)
    assert isinstance(key, int)
    items = (*node.value[:key], child, *node.value[key + 1 :])
    return Node(items, node.source, node.line)
