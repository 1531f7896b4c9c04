"""Where a training stands: everything that a step changes, as a dictionary to go on from."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.errors import RunError
from qdetr_cli.oscillation import OscillationFreezer
from qdetr_cli.processes import gathered, rank
from qdetr_cli.schedule import MovingAverage, random_state, restore_random_state


@dataclass(slots=True, kw_only=True)
class Position:
    """Steps done, seconds spent, and the best evaluation so far."""

    step: int = 0
    seconds: float = 0.0
    best_ap: float = -2.0  # below the -1 of a split without objects
    best_step: int = 0
    evaluated: int = 0  # the step of the last evaluation


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a step changes: `extras` are learned beside the model, `scaler` is that of fp16."""

    model: nn.Module
    extras: nn.Module
    optimizer: Any
    average: MovingAverage | None
    oscillation: OscillationFreezer | None
    scaler: Any
    device: torch.device
    position: Position = field(default_factory=Position)

    def state_dict(self) -> dict[str, Any]:
        """Everything, with the tensors themselves; only plain values and tensors.

        A meeting of all processes.
        """
        return {
            "model": self.model.state_dict(),
            "extras": self.extras.state_dict(),
            "groups": self._groups(),
            "optimizer": self.optimizer.state_dict(),
            **{name: each.state_dict() for name, each in self._optional().items()},
            "random": gathered(random_state(self.device)),
            "position": asdict(self.position),
        }

    def load(self, path: Path) -> None:
        """Go on from a file that holds a `state_dict`. Raises RunError for one that cannot be read."""
        if not path.exists():
            raise RunError(f"{path}: not found, so there is nothing to resume; run without --resume")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RunError(f"{path}: cannot be read ({error}); start again in another --out") from error
        self.model.load_state_dict(state["model"])
        self.extras.load_state_dict(state["extras"])
        self._regroup(state["groups"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, each in self._optional().items():
            each.load_state_dict(state[name])
        self.position = Position(**state["position"])
        states = state["random"]
        self._draw_on([states] if isinstance(states, dict) else states)

    def _draw_on(self, states: list[dict[str, Tensor]]) -> None:
        """Go on with the random numbers of this process; one more than there were begins with its own."""
        if rank() < len(states):
            restore_random_state(states[rank()], self.device)
        else:
            torch.manual_seed(1_000_003 * self.position.step + rank())

    def _optional(self) -> dict[str, Any]:
        parts = {"average": self.average, "oscillation": self.oscillation, "scaler": self.scaler}
        return {name: each for name, each in parts.items() if each is not None}

    def _groups(self) -> list[list[str]]:
        """The names of the optimiser's groups."""
        names = {parameter: name for name, parameter in self._parameters().items()}
        return [[names[each] for each in group["params"]] for group in self.optimizer.param_groups]

    def _regroup(self, groups: list[list[str]]) -> None:
        """Form the optimiser's groups as they were: rates depend on the steps that a training began with."""
        named, settings = self._parameters(), self.optimizer.param_groups[0]
        self.optimizer.param_groups = [
            {**settings, "params": [named[name] for name in names]} for names in groups
        ]

    def _parameters(self) -> dict[str, nn.Parameter]:
        beside = {f"extras.{name}": parameter for name, parameter in self.extras.named_parameters()}
        return {**dict(self.model.named_parameters()), **beside}
