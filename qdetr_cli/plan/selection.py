"""Which modules each rule selects, and every way in which a rule can miss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qdetr_cli.recipe import OP_SLOTS, Op, Rule, Slot, role_matches
from qdetr_cli.recipe.faults import Fault, near
from qdetr_cli.trace import GraphFacts, LayerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A module that rules can select. `blocked` says why it must stay float, "" for nearly all."""

    path: str
    aliases: tuple[str, ...]
    op: Op
    role: str
    macs: int
    weights: int
    channels: int
    blocked: str

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of its operation."""
        return OP_SLOTS[self.op]

    def named(self, pattern: str) -> bool:
        """True if one of its names matches the fnmatch pattern."""
        return any(fnmatchcase(name, pattern) for name in (self.path, *self.aliases))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One rule, the modules it selects, the roles and operations that are not there, and what is wrong."""

    index: int
    rule: Rule
    modules: tuple[Candidate, ...]
    missing: tuple[str, ...]  # each role; the operations where none of them is there
    faults: tuple[Fault, ...]

    @property
    def label(self) -> str:
        """`rules.2 (w4a4.yaml:31)`."""
        return f"rules.{self.index} ({self.rule.place})" if self.rule.place else f"rules.{self.index}"

    def selects(self, module: Candidate) -> bool:
        """True if the rule is about this module."""
        return module in self.modules

    def fault(self, key: str, message: str) -> Fault:
        """A fault at one key of the rule."""
        path = f"rules.{self.index}.{key}" if key else f"rules.{self.index}"
        return Fault(source=self.rule.source, line=self.rule.line, path=path, message=message)


def candidates(facts: GraphFacts) -> tuple[Candidate, ...]:
    """Every layer, attention and residual sum of the model, each in the order of the graph."""
    layers = [
        Candidate(
            path=layer.path,
            aliases=layer.aliases,
            op=layer.op,
            role=layer.role,
            macs=layer.macs,
            weights=layer.weights,
            channels=layer.weight_shape[0],
            blocked=_blocked(layer),
        )
        for layer in facts.layers
    ]
    attentions = [
        Candidate(
            path=attention.path,
            aliases=attention.aliases,
            op=attention.op,
            role=attention.role,
            macs=attention.macs,
            weights=0,
            channels=0,
            blocked="",
        )
        for attention in facts.attentions
    ]
    residuals = [
        Candidate(
            path=residual.path,
            aliases=residual.aliases,
            op="residual",
            role=residual.role,
            macs=0,
            weights=0,
            channels=0,
            blocked="",
        )
        for residual in facts.residuals
    ]
    return (*layers, *attentions, *residuals)


def _blocked(layer: LayerFacts) -> str:
    if layer.weight_bypassed:
        return "another module reads its weight without calling it"
    if layer.only_in_training:
        return "called in training alone: no prediction depends on it"
    return "" if layer.calls else "no forward pass calls it"


def select(index: int, rule: Rule, modules: tuple[Candidate, ...]) -> Selection:
    """The modules of a rule: selectors are and-ed, the entries of one selector or-ed."""
    missing = (*_missing_roles(rule, modules), *_missing_ops(rule, modules))
    chosen = tuple(module for module in modules if _fits(rule, module))
    bare = Selection(index=index, rule=rule, modules=chosen, missing=missing, faults=())
    faults = tuple(_pattern_faults(bare, modules))
    if not faults:
        faults = (*_empty_faults(bare), *_slot_faults(bare), *_blocked_faults(bare))
    return Selection(index=index, rule=rule, modules=chosen, missing=missing, faults=faults)


def _missing_roles(rule: Rule, modules: Iterable[Candidate]) -> Iterable[str]:
    return (role for role in rule.role if not any(role_matches(role, module.role) for module in modules))


def _missing_ops(rule: Rule, modules: Iterable[Candidate]) -> Iterable[str]:
    return () if {module.op for module in modules}.intersection(rule.op) else rule.op


def _fits(rule: Rule, module: Candidate) -> bool:
    return (
        (not rule.role or any(role_matches(role, module.role) for role in rule.role))
        and (not rule.path or any(module.named(pattern) for pattern in rule.path))
        and (not rule.op or module.op in rule.op)
    )


def _pattern_faults(selection: Selection, modules: tuple[Candidate, ...]) -> Iterable[Fault]:
    paths = [name for module in modules for name in (module.path, *module.aliases)]
    for pattern in selection.rule.path:
        if not any(module.named(pattern) for module in modules):
            hint = near(pattern, paths) or "; `qdetr inspect MODEL` lists the paths"
            yield selection.fault("path", f"{pattern} matches no layer or attention of this model{hint}")


def _empty_faults(selection: Selection) -> Iterable[Fault]:
    """Nothing selected, though each selector alone is fine. What the family lacks is no fault."""
    rule, missing = selection.rule, set(selection.missing)
    absent = any(names and missing.issuperset(names) for names in (rule.role, rule.op))
    if not selection.modules and not absent:
        yield selection.fault("", "selects no module: its selectors match, but none together")


def _slot_faults(selection: Selection) -> Iterable[Fault]:
    ops = sorted({module.op for module in selection.modules})
    slots = sorted({slot for op in ops for slot in OP_SLOTS[op]})
    for slot in selection.rule.slots():
        if ops and slot not in slots:
            message = f"no module that it selects has this slot; {', '.join(ops)}: {', '.join(slots)}"
            yield selection.fault(slot, message)


def _blocked_faults(selection: Selection) -> Iterable[Fault]:
    """A path that names only modules which must stay float: the setting cannot take effect."""
    rule = selection.rule
    for pattern in rule.path if rule.slots() else ():
        named = [module for module in selection.modules if module.named(pattern)]
        if named and all(module.blocked for module in named):
            yield selection.fault("path", f"{named[0].path} must stay float: {named[0].blocked}")
