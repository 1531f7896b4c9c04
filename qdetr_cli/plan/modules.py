"""The plan: every module and slot with its format and the rule that decided, or why it stays float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qdetr_cli.plan.costs import published_share
from qdetr_cli.recipe import BITS, Op, QuantFormat, Recipe, Slot, role_matches

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """What one slot becomes. `format` None: it stays float; `rule` is "" where no rule says anything."""

    slot: Slot
    format: QuantFormat | None
    rule: str  # the one that decided the bits: "rules.2 (w4a4.yaml:31)"

    @property
    def bits(self) -> int:
        """Bits of the slot, 32 for float."""
        return FLOAT_BITS if self.format is None else self.format.bits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What one module becomes: a plan for each slot that its operation has."""

    path: str
    aliases: tuple[str, ...]
    op: Op
    role: str
    slots: tuple[SlotPlan, ...]
    reason: str  # why it stays float, "" for a module with a quantized slot
    macs: int  # per image; of both products in attention
    weights: int  # elements of the weight, 0 for attention
    channels: int  # output channels of the weight, 0 for attention

    @property
    def is_float(self) -> bool:
        """True if no slot of it is quantized."""
        return all(slot.format is None for slot in self.slots)

    def slot(self, name: Slot) -> SlotPlan | None:
        """The plan of one slot, None where the operation has no such slot."""
        return next((slot for slot in self.slots if slot.slot == name), None)

    def format(self, name: Slot) -> QuantFormat | None:
        """The format of one slot, None where it stays float or does not exist."""
        slot = self.slot(name)
        return None if slot is None else slot.format

    def bits(self, name: Slot) -> int:
        """The bits of one slot, 32 where it stays float or does not exist."""
        slot = self.slot(name)
        return FLOAT_BITS if slot is None else slot.bits

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """(MACs, bits of one side, bits of the other) of each product that the module computes."""
        if self.op == "attention":
            half = self.macs // 2  # q times k, probs times v: equally many where q and v have one width
            return (half, self.bits("q"), self.bits("k")), (
                self.macs - half,
                self.bits("probs"),
                self.bits("v"),
            )
        if self.op == "deformable":
            return ((self.macs, self.bits("probs"), self.bits("v")),)
        if self.op == "residual":
            return ()
        return ((self.macs, self.bits("weight"), self.bits("input")),)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight and its float32 steps; 4 for each element of a float weight."""
        stated = self.format("weight")
        if stated is None:
            return 4 * self.weights
        steps = self.channels if stated.per == "channel" else 1
        return -(-self.weights * stated.bits // 8) + 4 * steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every module in the order of the model, what was passed over, and the ladder's groups."""

    modules: tuple[ModulePlan, ...]
    skipped: tuple[str, ...]  # to be said: roles and operations that are not there, rules without effect
    ladder: dict[str, tuple[str, ...]]  # group -> paths of its quantized modules

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, for a manifest; `from_dict` gives an equal plan back."""
        return {
            "modules": [asdict(module) for module in self.modules],
            "skipped": list(self.skipped),
            "ladder": {name: list(paths) for name, paths in self.ladder.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises ValueError that says what is no plan."""
        try:
            plan = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            raise ValueError(f"plan{_first(error)}") from error
        strange = {slot.bits for module in plan.modules for slot in module.slots} - {*BITS, FLOAT_BITS}
        if strange:
            raise ValueError(f"plan: {min(strange)} bits are not one of {', '.join(map(str, BITS))}")
        return plan

    def totals(self, parameters: int = 0) -> dict[str, float]:
        """What the plan costs and saves, per image where it is work; `costs` names the counting rules.

        `parameters`, the count of the whole model, brings the float rest (biases, norms, embeddings) in.
        """
        products = [product for module in self.modules for product in module.products]
        weights = sum(module.weights for module in self.modules)
        rest = 4 * max(parameters - weights, 0)
        return {
            "macs": sum(macs for macs, _, _ in products),
            "quantized_macs": sum(macs for macs, *bits in products if max(bits) < FLOAT_BITS),
            "bitops": sum(macs * left * right for macs, left, right in products),
            "float_bitops": sum(macs * FLOAT_BITS**2 for macs, _, _ in products),
            "operations": sum(macs * published_share(max(bits)) for macs, *bits in products),
            "bytes": sum(module.weight_bytes for module in self.modules) + rest,
            "float_bytes": 4 * weights + rest,
        }

    def costs(self, parameters: int = 0) -> tuple[tuple[str, str, str], ...]:
        """Rows of (what is counted, in float, under the plan), with units, for people."""
        sums = self.totals(parameters)
        macs, size = sums["macs"], "model" if parameters else "weights of Linear and Conv"
        return (
            ("MACs with both sides quantized", "0 %", f"{100 * sums['quantized_macs'] / max(macs, 1):.1f} %"),
            ("operations, rule of Q-DETR (1/8 at 4 bits)", _scaled(macs), _scaled(sums["operations"])),
            (
                "BitOps (MACs x bits x bits, float is 32)",
                _scaled(sums["float_bitops"]),
                _scaled(sums["bitops"]),
            ),
            (f"size of the {size}", _scaled(sums["float_bytes"], "B"), _scaled(sums["bytes"], "B")),
        )


def _scaled(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix: `12.3 G`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def ladder_groups(recipe: Recipe, modules: Iterable[ModulePlan]) -> dict[str, tuple[str, ...]]:
    """The recipe's groups as paths of quantized modules; a module is in the first group that names it."""
    groups: dict[str, list[str]] = {name: [] for name in recipe.ladder}
    for module in modules:
        if module.is_float:
            continue
        for name, roles in recipe.ladder.items():
            if any(role_matches(role, module.role) for role in roles):
                groups[name].append(module.path)
                break
    return {name: tuple(paths) for name, paths in groups.items() if paths}


def _first(error: ValidationError) -> str:
    """The first fault with its place."""
    fault = error.errors(include_url=False)[0]
    return f".{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
