"""The family's own detection loss: Hungarian matching, auxiliary decoder layers, denoising queries."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qdetr_cli.box_counts import box_counts, divided_by_all
from qdetr_cli.data import Batch
from qdetr_cli.errors import RunError
from qdetr_cli.families import Family
from qdetr_cli.features import Features, recorded
from qdetr_cli.matching import Predictions

LAYER_SUFFIX = re.compile(r"_(aux_|dn_)?\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionLoss:
    """The loss of one batch: the total, its terms summed over decoder layers, and the predictions."""

    total: Tensor
    terms: dict[str, Tensor]
    predictions: Predictions


def detection_loss(model: nn.Module, family: Family, batch: Batch, *, auxiliary: bool) -> DetectionLoss:
    """The family's own set loss (transformers' implementation) of `model` on `batch`.

    `auxiliary` adds the loss of every decoder layer, where the family has decoder layers. It never changes
    the predictions: DETR, Conditional-DETR and Table Transformer would feed the normed state on when
    `config.auxiliary_loss` is set, so where the checkpoint has it off the layers are read with hooks and only
    the loss sees a changed copy of the config. The predictions are those of the queries that eval mode has.
    `model` may be wrapped (DDP): the loss is computed inside its forward. RunError where there is no loss.
    """
    check_trainable(family)
    inner = cast(nn.Module, getattr(model, "module", model))
    wanted = auxiliary and family.layer_losses
    with _loss_in_forward(inner, family, wanted), recorded(inner, family) as features:
        outputs = model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
    terms: dict[str, Tensor] = {}
    for name, value in outputs.loss_dict.items():
        key = LAYER_SUFFIX.sub("", name)
        terms[key] = terms.get(key, torch.zeros_like(value.detach())) + value.detach()
    found = predictions_of(outputs, features, groups=_query_groups(inner, family))
    return DetectionLoss(total=outputs.loss, terms=terms, predictions=found)


def check_trainable(family: Family) -> None:
    """Raise RunError for a family that transformers has no loss for."""
    if not family.trainable:
        raise RunError(
            f"{family.name}: transformers has no loss for it, so it cannot be trained; inspect, quantize "
            "(calibration alone) and eval work"
        )


def _query_groups(model: Any, family: Family) -> int:
    """How many groups of queries a forward pass runs: in eval mode one."""
    return int(model.config.group_detr) if family.query_groups and model.training else 1


def predictions_of(outputs: Any, features: Features | None = None, *, groups: int = 1) -> Predictions:
    """Predictions and features of the queries that eval mode has.

    Denoising queries, which come first, are left out; of several groups of queries the first is taken.
    """
    real = _real_queries(outputs.logits.shape[1], getattr(outputs, "denoising_meta_values", None), groups)
    return Predictions(
        logits=outputs.logits[:, real],
        boxes=outputs.pred_boxes[:, real],
        co_attended=() if features is None else tuple(each[:, real] for each in features.co_attended),
        memory=None if features is None else features.memory,
        memory_mask=None if features is None else features.memory_mask,
    )


def _real_queries(queries: int, denoising: Any, groups: int = 1) -> slice:
    """Which queries eval mode has too; transformers' `denoising_meta_values` counts the denoising ones."""
    if denoising is None or queries != sum(denoising["dn_num_split"]):
        return slice(0, queries // groups)
    return slice(denoising["dn_num_split"][0], queries)


@contextmanager
def _loss_in_forward(model: nn.Module, family: Family, auxiliary: bool) -> Iterator[None]:
    """For the duration of the block, the loss in `model`'s forward has (or has not) auxiliary terms."""
    own = cast(Any, model).loss_function
    config = cast(Any, model).config
    flag = config.auxiliary_loss
    wanted = copy.copy(config)
    wanted.auxiliary_loss = auxiliary
    if family.query_groups:
        wanted.group_detr = _query_groups(model, family)  # transformers matches in groups in eval mode too
    read_layers = auxiliary and not flag and family.auxiliary_changes_predictions
    if not family.auxiliary_changes_predictions:
        config.auxiliary_loss = auxiliary  # DAB-DETR hands its layers to the loss only then

    def loss(
        logits: Tensor, labels: Any, device: Any, boxes: Tensor, _: Any, *stacks: Any, **rest: Any
    ) -> Any:
        if heads is not None:
            stacks = heads()
        if not auxiliary:  # denoising queries have auxiliary losses alone; DEIMv2 would match them as well
            real = _real_queries(logits.shape[1], rest.pop("denoising_meta_values", None))
            logits, boxes = logits[:, real], boxes[:, real]
        finite = bool(logits.isfinite().all() and boxes.isfinite().all())  # the matcher would not say so
        counts = box_counts(labels, logits.shape[1], finite=finite)
        with divided_by_all(counts), torch.autocast(device_type=torch.device(device).type, enabled=False):
            floats = [None if stack is None else stack.float() for stack in stacks]
            rest = {name: _as_float(value) for name, value in rest.items()}
            return own(logits.float(), labels, device, boxes.float(), wanted, *floats, **rest)

    with ExitStack() as watching:
        heads = watching.enter_context(decoder_layers(model)) if read_layers else None
        cast(Any, model).loss_function = loss
        try:
            yield
        finally:
            config.auxiliary_loss = flag
            cast(Any, model).loss_function = own


def auxiliary_predictions(model: Any, layers: list[Tensor], decoder: Any) -> tuple[Tensor, Tensor]:
    """Logits (layers, B, Q, C) and boxes (layers, B, Q, 4) of every decoder layer, as in the original DETR.

    A normed *copy* of each layer's output goes through the shared heads; the layers themselves are untouched.
    """
    states = model.model.decoder.layernorm(torch.stack(layers))  # (layers, B, Q, D)
    logits, boxes = model.class_labels_classifier(states), model.bbox_predictor(states)
    reference = getattr(decoder, "reference_points", None)  # Conditional-DETR, (Q, B, 2)
    if reference is not None:
        centre = torch.logit(reference.clamp(0, 1), eps=1e-5).transpose(0, 1)  # (B, Q, 2)
        boxes = torch.cat([boxes[..., :2] + centre, boxes[..., 2:]], dim=-1)
    return logits, boxes.sigmoid()


@contextmanager
def decoder_layers(model: Any) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """For the duration of the block, a function that gives the last pass's `auxiliary_predictions`."""
    layers: list[Tensor] = []
    decoder: list[Any] = []

    def keep_layer(module: nn.Module, inputs: Any, output: Any) -> None:
        layers.append(output[0] if isinstance(output, tuple) else output)

    def keep_decoder(module: nn.Module, inputs: Any, output: Any) -> None:
        decoder.append(output)

    handles = [layer.register_forward_hook(keep_layer) for layer in model.model.decoder.layers]
    handles.append(model.model.decoder.register_forward_hook(keep_decoder))
    try:
        yield lambda: auxiliary_predictions(model, layers, decoder[-1])
    finally:
        for handle in handles:
            handle.remove()


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
