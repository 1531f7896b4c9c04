"""What of a file runs in float, and why: the recipe says so, or a runtime lacks the integer kernel."""

from collections.abc import Iterator
from dataclasses import dataclass

from qdetr_cli.export.kernels import Kernels, Operation
from qdetr_cli.instructions import SAFE_BITS
from qdetr_cli.plan import ModulePlan, Plan
from qdetr_cli.recipe import QuantFormat, Slot

_PRODUCTS: tuple[tuple[Slot, Slot], ...] = (("q", "k"), ("probs", "v"))  # of an attention, in their order
_LAYER: tuple[Slot, Slot] = ("weight", "input")


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatOperation:
    """A convolution, linear layer or product that a runtime executes in float."""

    operation: Operation
    reason: str  # why it is meant to; "" where the plan has both its sides on integers

    @property
    def path(self) -> str:
        """The module that it is of, or the name of its node."""
        return self.operation.path or self.operation.name


def explained(kernels: Kernels, plan: Plan | None, *, narrow: bool = False) -> tuple[FloatOperation, ...]:
    """The float operations with what the plan says of each; without a plan the whole model is float.

    `narrow`: the file has only those products in integers whose second operand has at most 7 bits.
    """
    modules = {} if plan is None else dict(_by_path(plan))
    return tuple(
        FloatOperation(operation=each, reason=_reason(each, modules, narrow) if modules else "a float model")
        for each in kernels.floats()
    )


def _by_path(plan: Plan) -> Iterator[tuple[str, ModulePlan]]:
    """Each layer and attention by its path and by its other names."""
    for module in (each for each in plan.modules if each.op != "residual"):
        for path in (module.path, *module.aliases):
            yield path, module


def _reason(operation: Operation, modules: dict[str, ModulePlan], narrow: bool) -> str:
    module = modules.get(operation.path or "")
    if module is None:
        return "no rule can name it: it is no layer and no attention"
    if module.reason:
        return module.reason
    wanted = _PRODUCTS[operation.call % len(_PRODUCTS)] if operation.kind == "product" else _LAYER
    float_ = [each for each in module.slots if each.slot in wanted and each.format is None]
    if float_:
        return f"its {float_[0].slot} stays float ({float_[0].rule or 'no rule'})"
    second = wanted[0] if wanted is _LAYER else wanted[1]
    wide = [each for each in module.slots if each.slot == second and _is_wide(each.format)]
    return f"its {second} could overflow without VNNI, and the file is portable" if narrow and wide else ""


def _is_wide(format: QuantFormat | None) -> bool:
    """Whether the whole numbers of a format may be beyond -64..64."""
    return format is not None and format.bits + (format.mid_rise or not format.symmetric) > SAFE_BITS
