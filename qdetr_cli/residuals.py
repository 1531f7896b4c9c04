"""Residual sums of convolutional backbones: which modules give what is added, and what the sum becomes.

A sum in float is written and read several times at full width, and a backbone of integer convolutions then
waits for memory more than it computes. So two values get a grid where they are made: the sum, behind the
activation that follows it, and the shortcut that enters it, unless that is the sum of the block before.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)

Owner = Callable[[fx.Node], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualFacts:
    """One module whose output enters a residual sum as its shortcut, or is the sum; it is called once."""

    path: str
    aliases: tuple[str, ...]
    role: str


def givers(nodes: Iterable[fx.Node], owner: Owner) -> tuple[str, ...]:
    """The paths of those modules, in the order of the graph; `owner` is the path of a node's module."""
    nodes = [node for node in nodes if node.op == "call_function"]
    found: dict[str, None] = {}
    for node in nodes:
        if node.target in ADDITIONS and _adds_maps(node):
            found |= dict.fromkeys(_of_sum(node, owner))
    return tuple(path for path in found if _called_once(path, nodes))


def _adds_maps(node: fx.Node) -> bool:
    """Whether it adds two computed maps (B, D, h, w) of one shape."""
    operands = [each for each in node.args if isinstance(each, fx.Node) and each.op == "call_function"]
    shapes = [tuple(each.meta["val"].shape) for each in operands]
    return len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 4


def _of_sum(node: fx.Node, owner: Owner) -> Iterator[str]:
    """The module of the shortcut, then that of the sum; neither where it cannot be told."""
    shortcut: Any = node.args[1]
    block, maker = owner(node), owner(shortcut)
    if _within(maker, block) and maker != block:
        yield f"{block}.{maker.removeprefix(block + '.').partition('.')[0]}"
    elif _leaves(shortcut, maker, owner):
        yield maker
    users = list(node.users)
    activation = owner(users[0]) if len(users) == 1 and len(users[0].all_input_nodes) == 1 else block
    if _within(activation, block) and activation != block:
        yield activation
    elif _leaves(node, block, owner):
        yield block


def _within(path: str, block: str) -> bool:
    """Whether a module is `block` or inside it."""
    return f"{path}.".startswith(f"{block}.")


def _leaves(node: fx.Node, path: str, owner: Owner) -> bool:
    """Whether a value is read outside the module that made it alone: then it is what the module returns."""
    return bool(path) and not any(_within(owner(user), path) for user in node.users)


def _called_once(path: str, nodes: Iterable[fx.Node]) -> bool:
    """Whether a module is called once: torch.export marks each later call of it with `@` in the stack."""
    stacks = [node.meta.get("nn_module_stack", {}) for node in nodes]
    return not any("@" in key and own == path for stack in stacks for key, (own, _) in stack.items())
