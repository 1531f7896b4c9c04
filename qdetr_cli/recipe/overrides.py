"""`--set dotted.key=value`: values put over a recipe's tree."""

from __future__ import annotations

from collections.abc import Sequence

from qdetr_cli.recipe.faults import Fault
from qdetr_cli.recipe.names import check_formats_used, formats_of
from qdetr_cli.recipe.nodes import Node, compose, replace, tree


def overridden(root: Node, overrides: Sequence[str], faults: list[Fault]) -> Node:
    """The root under `--set` flags; formats first, so that a rule's format can then be changed in place."""
    flags = [_flag(text, faults) for text in overrides]
    for keys, value in flags:
        if keys[:1] == ["formats"]:
            root = _override(root, keys, value, (), root, faults)
    check_formats_used(root, faults)
    for keys, value in flags:
        if keys and keys[0] != "formats":
            root = _override(root, keys, value, (), root, faults)
    return root


def _flag(text: str, faults: list[Fault]) -> tuple[list[str], Node]:
    """The dotted keys and the value of `--set key=value`; the value is read as YAML."""
    source = f"--set {text}"
    key, equals, value = text.partition("=")
    if key.strip() == "extends":
        message = "cannot be set by a flag; write a recipe (`qdetr recipe new`)"
        faults.append(Fault(source=source, line=0, path="extends", message=message))
        return [], Node(None, source, 0)
    if not equals or not all(key.strip().split(".")):
        message = "is not key=value; for example --set train.epochs=3"
        faults.append(Fault(source=source, line=0, path="", message=message))
        return [], Node(None, source, 0)
    node = compose(value, source, faults) if value.strip() else Node("", source, 0)
    return key.strip().split("."), tree(node.plain() if node else None, source)


def _override(
    node: Node, keys: Sequence[str], value: Node, done: tuple[str, ...], root: Node, faults: list[Fault]
) -> Node:
    """The node with `value` at `keys` below it."""
    if not keys:
        return value
    node, dotted = _opened(node, done, root), ".".join((*done, keys[0]))
    if isinstance(node.value, tuple):
        return _override_item(node, keys, value, done, root, faults)
    if not isinstance(node.value, dict):
        message = f"{'.'.join(done)} is a value and not a section"
        faults.append(value.fault(dotted, message))
        return node
    child = node.child(keys[0]) or Node({}, value.source, 0)
    return replace(node, keys[0], _override(child, keys[1:], value, (*done, keys[0]), root, faults))


def _override_item(
    node: Node, keys: Sequence[str], value: Node, done: tuple[str, ...], root: Node, faults: list[Fault]
) -> Node:
    assert isinstance(node.value, tuple)
    count, key = len(node.value), keys[0]
    if not key.isdecimal() or int(key) >= count:
        message = f"{key} is not one of its {count} entries, numbered from 0"
        faults.append(value.fault(".".join((*done, key)), message))
        return node
    child = _override(node.value[int(key)], keys[1:], value, (*done, key), root, faults)
    return replace(node, int(key), child)


def _opened(node: Node, path: tuple[str, ...], root: Node) -> Node:
    """The node, or the mapping that its short form stands for: a format's name, a plugin's name, nothing."""
    if node.value is None:
        return Node({}, node.source, node.line)
    if isinstance(node.value, str) and path[-1] in ("init", "quantizer"):
        return Node({"name": node}, node.source, node.line)
    if isinstance(node.value, str) and len(path) == 3 and path[0] == "rules":
        return formats_of(root).get(node.value, node)
    return node
