"""Named formats: found in a recipe's tree, and put where rules name them."""

from __future__ import annotations

from collections.abc import Iterable

from qdetr_cli.recipe.faults import Fault, near
from qdetr_cli.recipe.formats import SLOTS
from qdetr_cli.recipe.nodes import Node, replace


def formats_of(root: Node) -> dict[str, Node]:
    """The named formats, and the one name that needs no definition: float."""
    formats = root.child("formats")
    stated = formats.value if formats and isinstance(formats.value, dict) else {}
    float_format = Node({"bits": Node("float", root.source, 0)}, root.source, 0)
    return {**stated, "float": float_format}


def rules_of(root: Node) -> tuple[Node, ...]:
    """The rules' nodes, () where there is no list of rules."""
    rules = root.child("rules")
    return rules.value if rules is not None and isinstance(rules.value, tuple) else ()


def _slots(root: Node) -> Iterable[tuple[int, str, Node]]:
    """Every slot that a rule sets: the rule's number, the slot, what is stated."""
    for index, rule in enumerate(rules_of(root)):
        for slot in SLOTS:
            stated = rule.child(slot)
            if stated is not None:
                yield index, slot, stated


def check_formats_used(root: Node, faults: list[Fault]) -> None:
    """A format that no rule uses cannot take effect; often it is a misspelt name of an inherited one."""
    used = {stated.value for _, _, stated in _slots(root) if isinstance(stated.value, str)}
    formats = root.child("formats")
    for name, node in formats.value.items() if formats and isinstance(formats.value, dict) else ():
        if name == "float":
            faults.append(node.fault("formats.float", "the name float is taken: it is {bits: float}"))
        elif name not in used:
            hint = near(name, used) or "; remove it"
            faults.append(node.fault(f"formats.{name}", f"no rule uses this format{hint}"))


def without_names(root: Node, faults: list[Fault]) -> tuple[Node, set[tuple[int, str]]]:
    """The root with format names replaced by the formats, and which rule's slots held names."""
    formats, rules, by_name = formats_of(root), root.child("rules"), set()
    for index, slot, stated in list(_slots(root)):
        if not isinstance(stated.value, str) or rules is None:
            continue
        by_name.add((index, slot))
        meant = formats.get(stated.value)
        if meant is None:
            names = ", ".join(formats)
            hint = near(stated.value, formats)
            message = f"{stated.value} is not a format{hint}; formats: {names}; or write {{bits: 8}}"
            faults.append(stated.fault(f"rules.{index}.{slot}", message))
            meant = Node({"bits": Node(8, stated.source, stated.line)}, stated.source, stated.line)
        placed = Node(meant.value, stated.source, stated.line)
        rules = replace(rules, index, replace(rules.at([index]), slot, placed))
    return (replace(root, "rules", rules) if rules is not None else root), by_name
