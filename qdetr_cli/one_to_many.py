"""Auxiliary queries in training only: a second set of learned queries, each object matched to several.

One-to-one matching gives few queries a target in each image, and low-bit students learn slowly from it. The
decoder reads the same memory once more with queries of its own (as a group of its own, so the real queries
never see them), and every object is repeated in the targets (H-DETR, Jia et al. 2023, sec. 3.3; auxiliary
queries for quantized DETRs: AQ-DETR, 2024). At inference nothing of it is left.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.box_counts import box_counts, divided_by_all
from qdetr_cli.errors import RecipeError
from qdetr_cli.families import Family
from qdetr_cli.losses import decoder_layers
from qdetr_cli.matching import Labels
from qdetr_cli.recipe import OneToMany

# Noise on the copied query embeddings, in units of their own standard deviation. Near the own queries (0.1)
# they cost Conditional-DETR 11 points of AP50 (2-2-8, 500 steps); away from them they gain a little.
SPREAD = 1.0


class AuxiliaryQueries(nn.Module):
    """Learned query embeddings (Q, D) that begin about the model's own, apart from them, and their loss.

    Raises RecipeError for families whose queries are no learned embedding, and for checkpoints that were
    trained with transformers' own auxiliary losses.
    """

    def __init__(self, model: Any, family: Family, spec: OneToMany) -> None:
        super().__init__()
        if family.query_argument is None:
            raise RecipeError(
                f"train.one_to_many: {family.name} has no learned query embedding that could be doubled; "
                "drop the key"
            )
        if family.auxiliary_changes_predictions and model.config.auxiliary_loss:
            raise RecipeError(
                "train.one_to_many: this checkpoint's decoder feeds on normed states (config.auxiliary_loss "
                "is true), which the auxiliary queries would not; drop the key"
            )
        self.argument, self.spec = family.query_argument, spec
        own = model.model.query_position_embeddings.weight.detach()
        self.queries = nn.Parameter(own + SPREAD * own.std() * torch.randn_like(own))

    @contextmanager
    def listening(self, model: Any) -> Iterator[dict[str, Any]]:
        """For the duration of the block the arguments of the decoder's last call are kept here."""
        call: dict[str, Any] = {}

        def keep(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
            call.update(given)

        handle = model.model.decoder.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield call
        finally:
            handle.remove()

    def loss(self, model: Any, call: dict[str, Any], labels: Labels, *, auxiliary: bool) -> Tensor:
        """The detection loss of the auxiliary queries on repeated objects, a scalar, not weighted."""
        positions = self.queries.to(call[self.argument].dtype).expand_as(call[self.argument])
        with decoder_layers(model) as heads:
            model.model.decoder(**{**call, self.argument: positions})
            logits, boxes = heads()  # (layers, B, Q, C), (layers, B, Q, 4)
        config = copy.copy(model.config)
        config.auxiliary_loss = auxiliary
        repeated = [
            {name: _repeat(value, self.spec.copies) for name, value in each.items()} for each in labels
        ]
        stacks = (logits.float(), boxes.float())
        counts = box_counts(repeated, logits.shape[2], finite=True)
        with divided_by_all(counts), torch.autocast(device_type=logits.device.type, enabled=False):
            found = model.loss_function(
                stacks[0][-1],
                repeated,
                logits.device,
                stacks[1][-1],
                config,
                *(stacks if auxiliary else (None, None)),
            )
        total: Tensor = found[0]
        return total


def _repeat(value: Tensor, copies: int) -> Tensor:
    return value.repeat(copies, *[1] * (value.dim() - 1))
