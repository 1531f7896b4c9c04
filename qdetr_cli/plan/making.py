"""Rules over graph facts give a plan: later rules win, slot by slot and field by field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature

import torch

from qdetr_cli import plugins
from qdetr_cli.errors import QDetrError
from qdetr_cli.plan.modules import ModulePlan, Plan, SlotPlan, ladder_groups
from qdetr_cli.plan.selection import Candidate, Selection, candidates, select
from qdetr_cli.quantizers import make_quantizer
from qdetr_cli.recipe import Format, QuantFormat, Recipe, Slot, overlay, resolve_format
from qdetr_cli.recipe.faults import Fault, near, raise_faults
from qdetr_cli.trace import GraphFacts

_KEPT = Format(bits="float")


def make_plan(recipe: Recipe, facts: GraphFacts) -> Plan:
    """The plan of a recipe for a model.

    Raises a RecipeError that lists every fault: a path pattern that matches nothing, a slot that no selected
    module has, bits that no rule gives, a plugin that is unknown or refuses its options. Roles and operations
    that the family lacks, and rules that later ones override everywhere, are told in `skipped`.
    """
    modules = candidates(facts)
    selections = [select(index, rule, modules) for index, rule in enumerate(recipe.rules)]
    faults = [fault for selection in selections for fault in selection.faults]
    settled = [_settle_module(module, selections) for module in modules]
    faults += _format_faults(slot for slots in settled for slot in slots)
    raise_faults("this plan", faults)
    planned = tuple(_planned(module, slots) for module, slots in zip(modules, settled, strict=True))
    return Plan(
        modules=planned,
        skipped=(*_missing(selections, facts.family), *_overridden(selections, settled)),
        ladder=ladder_groups(recipe, planned),
    )


@dataclass(frozen=True, slots=True)
class _Settled:
    """One slot after all rules: the merged format, and which selection each of its fields comes from."""

    slot: Slot
    stated: Format | None  # None: no rule says anything
    owners: dict[str, Selection]

    @property
    def format(self) -> QuantFormat | None:
        if self.stated is None or not isinstance(self.stated.bits, int):
            return None
        return resolve_format(self.slot, self.stated)

    @property
    def rule(self) -> str:
        """The rule that decided the bits."""
        return self.owners["bits"].label if "bits" in self.owners else ""


def _settle_module(module: Candidate, selections: Sequence[Selection]) -> list[_Settled]:
    mine = [selection for selection in selections if selection.selects(module)]
    if module.blocked:
        return [_Settled(slot, None, {}) for slot in module.slots]
    return [_settle(slot, mine) for slot in module.slots]


def _settle(slot: Slot, selections: Iterable[Selection]) -> _Settled:
    stated: list[Format] = []
    owners: dict[str, Selection] = {}
    for selection in selections:
        if selection.rule.keep:
            stated, owners = [_KEPT], {"bits": selection}
        elif slot in selection.rule.slots():
            said = selection.rule.slots()[slot]
            stated.append(said)
            owners |= {name: selection for name, value in said if value is not None}
    merged = overlay(stated) if stated else None
    if merged is not None and merged.bits == "float":
        owners = {"bits": owners["bits"]}  # the rest of a float slot is idle
    return _Settled(slot, merged, owners)


def _planned(module: Candidate, settled: Sequence[_Settled]) -> ModulePlan:
    slots = tuple(SlotPlan(slot=each.slot, format=each.format, rule=each.rule) for each in settled)
    plan = ModulePlan(
        path=module.path,
        aliases=module.aliases,
        op=module.op,
        role=module.role,
        slots=slots,
        reason="",
        macs=module.macs,
        weights=module.weights,
        channels=module.channels,
    )
    return replace(plan, reason=_reason(module, slots)) if plan.is_float else plan


def _reason(module: Candidate, slots: Sequence[SlotPlan]) -> str:
    rules = ", ".join(dict.fromkeys(slot.rule for slot in slots if slot.rule))
    if module.blocked:
        return module.blocked
    return f"kept float by {rules}" if rules else "no rule"


def _missing(selections: Iterable[Selection], family: str) -> Iterator[str]:
    where: dict[str, list[str]] = {}
    for selection in selections:
        for name in selection.missing:
            where.setdefault(name, []).append(selection.label)
    for name, labels in where.items():
        yield f"{family} has no {name}: skipped in {', '.join(labels)}"


def _overridden(selections: Iterable[Selection], settled: Iterable[Sequence[_Settled]]) -> Iterator[str]:
    effective = {owner.index for slots in settled for slot in slots for owner in slot.owners.values()}
    for selection in selections:
        if selection.modules and selection.index not in effective:
            yield f"{selection.label} has no effect: what it selects stays float, or later rules decide"


def _format_faults(slots: Iterable[_Settled]) -> Iterator[Fault]:
    """Faults of formats that show only when all rules have spoken; each distinct format is tried once."""
    tried: list[tuple[Slot, Format]] = []
    for slot in slots:
        if slot.stated is None or (slot.slot, slot.stated) in tried:
            continue
        tried.append((slot.slot, slot.stated))
        if slot.stated.bits is None:
            last = list(slot.owners.values())[-1]
            yield last.fault(slot.slot, "no rule gives bits here; add bits: 2 to 8, or float")
        elif slot.format is not None:
            yield from _plugin_faults(slot, slot.format)


def _plugin_faults(slot: _Settled, format: QuantFormat) -> Iterator[Fault]:
    """Unknown quantizers and ranges, and what they say to their options in a trial on four numbers."""
    owner = slot.owners["bits"]
    known = True
    for kind, key, name in (("quantizer", "quantizer", format.quantizer), ("range", "init", format.init)):
        names = plugins.names(kind)  # type: ignore[arg-type]
        if name not in names:
            known = False
            message = f"{name} is not a registered {kind}{near(name, names)}; registered: {', '.join(names)}"
            yield slot.owners.get(key, owner).fault(f"{slot.slot}.{key}", message)
    if known:
        yield from _trial(slot, format)


def _trial(slot: _Settled, format: QuantFormat) -> Iterator[Fault]:
    owner = slot.owners["bits"]
    try:
        make_quantizer(format, axis=None, channels=1)
    except QDetrError as error:
        yield slot.owners.get("quantizer", owner).fault(f"{slot.slot}.quantizer", str(error))
    place = slot.owners.get("init", owner)
    plugin = plugins.get("range", format.init)
    unknown = set(format.init_options) - set(signature(plugin).parameters)
    if unknown:
        valid = ", ".join(list(signature(plugin).parameters)[2:]) or "none"
        message = f"{format.init} has no option {', '.join(sorted(unknown))}; options: {valid}"
        yield place.fault(f"{slot.slot}.init", message)
        return
    try:
        plugin(torch.tensor([[-1.0, 0.5, -1.0, 1.0]]), format, **format.init_options)
    except Exception as error:  # a plugin may raise anything, for example at an option of the wrong type
        yield place.fault(f"{slot.slot}.init", f"{format.init}: {error}")
