"""The loss of every family: the float model's while quantizers are off, transformers' own, and its truths."""

import copy
from typing import Any

import pytest
import torch
from family_models import FAMILIES, NAMES, TRAINABLE, batch, facts_of, ready, set_mode
from tiny_detectors import CONFIGS
from torch import Tensor, nn

from qdetr_cli.data import Batch
from qdetr_cli.errors import RunError
from qdetr_cli.families import Family, family_of
from qdetr_cli.fold import fold_batch_norms
from qdetr_cli.losses import DetectionLoss, detection_loss
from qdetr_cli.rewrite import set_enabled


def family(name: str) -> Family:
    return family_of(CONFIGS[name]["model_type"])


FED_ON = tuple(name for name in FAMILIES if family(name).auxiliary_changes_predictions)
GROUPED = tuple(name for name in FAMILIES if family(name).query_groups)
DENOISED = tuple(name for name in FAMILIES if "num_denoising" in CONFIGS[name])
LAYERED = tuple(name for name in FAMILIES if family(name).layer_losses)
PLAIN = tuple(name for name in FAMILIES if name not in FED_ON)

RECIPE = "w4a4"  # without balance, which with quantizers off is the float model but for rounding

modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def loss_of(
    model: nn.Module, name: str, images: Batch, training: bool, auxiliary: bool = True
) -> DetectionLoss:
    set_mode(model, training)
    torch.manual_seed(5)  # denoising queries
    with torch.no_grad():
        return detection_loss(model, family(name), images, auxiliary=auxiliary)


def own_loss(model: nn.Module, images: Batch, training: bool, **changes: Any) -> Any:
    """What transformers gives for a model with these changes of its config."""
    reference = copy.deepcopy(model)
    for key, value in changes.items():
        setattr(reference.config, key, value)
    set_mode(reference, training)
    torch.manual_seed(5)
    with torch.no_grad():
        return reference(pixel_values=images.pixel_values, pixel_mask=images.pixel_mask, labels=images.labels)


@modes
@pytest.mark.parametrize("name", TRAINABLE)
def test_it_is_the_float_models_while_quantizers_are_off(name: str, training: bool) -> None:
    """Total, terms and predictions, denoising and auxiliary losses included, to the last bit."""
    made, images = ready(name, RECIPE), batch()
    off, folded = copy.deepcopy(made.model), copy.deepcopy(made.float)
    set_enabled(off, None, False)
    fold_batch_norms(folded, made.facts.batch_norms)
    got, exact, expected = (loss_of(each, name, images, training) for each in (off, folded, made.float))
    assert got.terms.keys() == exact.terms.keys()
    assert torch.equal(got.total, exact.total)
    assert all(torch.equal(value, exact.terms[key]) for key, value in got.terms.items())
    assert torch.equal(got.predictions.logits, exact.predictions.logits)
    torch.testing.assert_close(got.total, expected.total, rtol=1e-3, atol=1e-3)
    on = loss_of(made.model, name, images, training)
    assert not torch.equal(on.total, got.total), "the quantizers that were off do something when on"


@modes
@pytest.mark.parametrize("name", PLAIN)
def test_it_is_transformers_own(name: str, training: bool) -> None:
    """With a loss for each decoder layer; queries of all groups are matched as one group in eval mode."""
    model, images = facts_of(name)[0], batch()
    changes: dict[str, Any] = {"auxiliary_loss": family(name).layer_losses}
    if family(name).query_groups and not training:
        changes["group_detr"] = 1
    expected = own_loss(model, images, training, **changes)
    found = loss_of(model, name, images, training)
    torch.testing.assert_close(found.total, expected.loss, rtol=1e-6, atol=1e-6)
    terms = torch.stack(list(expected.loss_dict.values())).sum()
    torch.testing.assert_close(torch.stack(list(found.terms.values())).sum(), terms, rtol=1e-5, atol=1e-5)


@modes
@pytest.mark.parametrize("name", FED_ON)
def test_layers_that_feed_each_other_have_the_losses_of_decoders_cut_short(name: str, training: bool) -> None:
    model, images = facts_of(name)[0], batch()
    count = len(model.get_submodule("model.decoder.layers"))
    short = copy.deepcopy(model)
    losses = []
    for layers in range(count, 0, -1):
        short.model.decoder.layers = short.model.decoder.layers[:layers]
        losses.append(own_loss(short, images, training, auxiliary_loss=False).loss)
    found = loss_of(model, name, images, training)
    torch.testing.assert_close(found.total, torch.stack(losses).sum(), rtol=1e-5, atol=1e-5)
    naive = own_loss(model, images, training, auxiliary_loss=True)
    assert (naive.logits - found.predictions.logits).abs().max() > 1e-3, "the flag changes predictions"


@pytest.mark.parametrize("name", FED_ON)
def test_a_checkpoint_that_was_trained_with_the_flag_keeps_its_predictions(name: str) -> None:
    model, images = copy.deepcopy(facts_of(name)[0]), batch()
    model.config.auxiliary_loss = True
    expected = own_loss(model, images, False)
    found = loss_of(model, name, images, False)
    assert torch.equal(found.predictions.logits, expected.logits)
    torch.testing.assert_close(found.total, expected.loss)


@pytest.mark.parametrize("name", LAYERED)
def test_auxiliary_losses_come_on_top_and_leave_predictions_alone(name: str) -> None:
    model, images = facts_of(name)[0], batch()
    flag = model.config.auxiliary_loss
    both = [loss_of(model, name, images, False, auxiliary) for auxiliary in (False, True)]
    set_mode(model, False)
    with torch.no_grad():
        plain = model(pixel_values=images.pixel_values, pixel_mask=images.pixel_mask)
    for found in both:
        assert torch.equal(found.predictions.logits, plain.logits)
        assert torch.equal(found.predictions.boxes, plain.pred_boxes)
    assert both[1].total > 1.2 * both[0].total
    assert model.config.auxiliary_loss == flag


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_queries_are_matched_one_to_one_in_eval_mode(name: str) -> None:
    """Transformers cuts the 7 queries of eval mode into 3 groups, and matches each object 3 times."""
    model, images = facts_of(name)[0], batch((2, 1))
    found = loss_of(model, name, images, False)
    naive = own_loss(model, images, False)
    assert float(naive.loss) != pytest.approx(float(found.total), rel=1e-2)
    with torch.no_grad():
        matched = matched_queries(model, images)
    assert matched == [2, 1]


def matched_queries(model: nn.Module, images: Batch) -> list[int]:
    """How many queries of each image the last layer's matching takes, seen in the matcher."""
    from transformers.loss import loss_lw_detr

    seen: list[list[int]] = []
    own = loss_lw_detr.LwDetrHungarianMatcher.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = own(self, *args, **kwargs)
        seen.append([len(source) for source, _ in pairs])
        return pairs

    loss_lw_detr.LwDetrHungarianMatcher.forward = spy
    try:
        detection_loss(model.eval(), family_of(model), images, auxiliary=True)
    finally:
        loss_lw_detr.LwDetrHungarianMatcher.forward = own
    assert all(each == seen[0] for each in seen), "in every layer and in the proposals"
    return seen[0]


@pytest.mark.parametrize("name", GROUPED)
def test_training_matches_every_group_and_predicts_with_the_first(name: str) -> None:
    """What distillation compares are the queries of eval mode: the first group, which sees no other."""
    model, images = facts_of(name)[0], batch()
    in_training = loss_of(model, name, images, True).predictions
    in_eval = loss_of(model, name, images, False).predictions
    assert own_loss(model, images, True).logits.shape[1] == 3 * in_eval.logits.shape[1]
    torch.testing.assert_close(in_training.logits, in_eval.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_training.boxes, in_eval.boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DENOISED)
def test_denoising_queries_are_cut_from_predictions_and_change_none(name: str) -> None:
    model, images = facts_of(name)[0], batch()
    in_training = loss_of(model, name, images, True).predictions
    in_eval = loss_of(model, name, images, False).predictions
    assert own_loss(model, images, True).logits.shape[1] > in_eval.logits.shape[1]
    torch.testing.assert_close(in_training.logits, in_eval.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_training.boxes, in_eval.boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DENOISED)
def test_without_auxiliary_losses_denoising_queries_are_not_matched(name: str) -> None:
    """The training loss is then the loss of eval mode. DEIMv2's own code would match denoising queries."""
    model, images = facts_of(name)[0], batch()
    in_training, in_eval = (loss_of(model, name, images, mode, auxiliary=False) for mode in (True, False))
    torch.testing.assert_close(in_training.total, in_eval.total, rtol=1e-4, atol=1e-4)
    if name.startswith("deimv2"):
        naive = own_loss(model, images, True, auxiliary_loss=False)
        assert float(naive.loss) != pytest.approx(float(in_eval.total), rel=1e-2)


@pytest.mark.parametrize("name", [name for name in DENOISED if name.startswith(("d_fine", "deimv2"))])
def test_self_distillation_teaches_quantized_layers(name: str) -> None:
    """FGL and DDF: earlier layers learn the distribution of the last one, through what is quantized."""
    model, images = copy.deepcopy(ready(name).model), batch()
    set_mode(model, True)
    model.config.auxiliary_loss = True
    torch.manual_seed(5)
    terms = model(
        pixel_values=images.pixel_values, pixel_mask=images.pixel_mask, labels=images.labels
    ).loss_dict
    found = loss_of(model, name, images, True).terms
    assert {"loss_fgl", "loss_ddf", "loss_mal" if name.startswith("deimv2") else "loss_vfl"} <= set(found)
    for kind in ("loss_fgl", "loss_ddf"):
        model.zero_grad()
        chosen: list[Tensor] = [value for key, value in terms.items() if key.startswith(kind)]
        total = torch.stack(chosen).sum()
        assert total.isfinite()
        assert total > 0
        torch.testing.assert_close(total.detach(), found[kind])
        total.backward(retain_graph=True)
        moved = {key for key, each in model.named_parameters() if each.grad is not None and each.grad.any()}
        for part in (
            "model.decoder.bbox_embed.0.layers.1.",
            "model.decoder.layers.0.encoder_attn.v_quantizer.",
        ):
            assert any(key.startswith(part) and key.endswith("step") for key in moved), (kind, part)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("objects", [(0, 0), (0, 2)], ids=["no objects", "one empty image"])
def test_images_without_objects_train(name: str, objects: tuple[int, ...]) -> None:
    model = copy.deepcopy(ready(name).model)
    set_mode(model, True)
    found = detection_loss(model, family(name), batch(objects), auxiliary=True)
    found.total.backward()
    assert found.total.isfinite()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRAINABLE])
def test_a_family_without_a_loss_says_so(name: str) -> None:
    with pytest.raises(RunError, match=f"{family(name).name}: transformers has no loss for it, so it cannot"):
        detection_loss(facts_of(name)[0], family(name), batch(), auxiliary=True)
