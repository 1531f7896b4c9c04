"""Which quantizers are on as a training goes: module groups one after another, weights before activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from qdetr_cli.errors import RecipeError
from qdetr_cli.plan import Plan
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import Stage, role_matches
from qdetr_cli.rewrite import quantizers


class Stages:
    """The quantizers of a model, and which of them each stage of a recipe has on.

    Raises RecipeError for a stage that selects nothing.
    """

    def __init__(self, model: nn.Module, plan: Plan | None, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.quantizers = quantizers(model)
        roles = {} if plan is None else {module.path: module.role for module in plan.modules}
        self.chosen = [self._chosen(index, stage, roles) for index, stage in enumerate(self.stages)]

    def _chosen(self, index: int, stage: Stage, roles: dict[str, str]) -> set[FakeQuantizer]:
        chosen = {
            quantizer
            for path, quantizer in self.quantizers.items()
            if _selects(stage, roles.get(path.rpartition(".")[0], ""), path.rpartition(".")[2])
        }
        if not chosen:
            raise RecipeError(f"train.stages.{index}: selects nothing that this recipe quantizes")
        return chosen

    def enter(self, done: float) -> None:
        """Switch on what is quantized when the fraction `done` of the steps is behind."""
        current = next((i for i, stage in enumerate(self.stages) if done < stage.until), None)
        for quantizer in self.quantizers.values():
            quantizer.enabled = current is None or quantizer in self.chosen[current]

    @contextmanager
    def all_on(self) -> Iterator[None]:
        """For the duration of the block everything is quantized: what is measured and saved always is."""
        before = {quantizer: quantizer.enabled for quantizer in self.quantizers.values()}
        for quantizer in before:
            quantizer.enabled = True
        try:
            yield
        finally:
            for quantizer, enabled in before.items():
                quantizer.enabled = enabled


def _selects(stage: Stage, role: str, name: str) -> bool:
    in_roles = not stage.roles or any(role_matches(each, role) for each in stage.roles)
    return in_roles and (not stage.slots or name.removesuffix("_quantizer") in stage.slots)
