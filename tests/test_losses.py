"""The family's own detection loss: against transformers', and decoders cut short."""

import copy

import pytest
import torch
from tiny_batches import batch
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.losses import detection_loss, predictions_of

FED_ON = ("detr", "conditional_detr", "table-transformer")
OTHERS = ("rt_detr", "d_fine")
INSIDE = ("dab-detr", "deformable_detr")  # they hand their layers to the loss only when the flag is on


def built(name: str, **changes):
    torch.manual_seed(0)
    detector = load_config_model({**tiny_config(name), **changes}, None)
    with torch.no_grad():  # random initialisation hides what auxiliary losses do to predictions
        for parameter in detector.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return detector


@pytest.mark.parametrize("name", FED_ON)
def test_auxiliary_losses_do_not_change_predictions(name):
    detector, images = built(name, auxiliary_loss=False), batch()
    with torch.no_grad():
        plain = detector.model(pixel_values=images.pixel_values, pixel_mask=images.pixel_mask)
        found = detection_loss(detector.model, detector.family, images, auxiliary=True)
    torch.testing.assert_close(found.predictions.logits, plain.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.predictions.boxes, plain.pred_boxes, rtol=0, atol=0)
    assert detector.model.config.auxiliary_loss is False


@pytest.mark.parametrize("name", FED_ON)
def test_the_naive_flag_does_change_predictions(name):
    """Why the correction is needed: with transformers' flag the same weights say something else."""
    detector, images = built(name, auxiliary_loss=False), batch()
    naive = copy.deepcopy(detector.model)
    naive.model.decoder.config.auxiliary_loss = True
    with torch.no_grad():
        logits = detector.model(pixel_values=images.pixel_values).logits
        assert (naive(pixel_values=images.pixel_values).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", FED_ON)
def test_auxiliary_total_is_the_sum_over_layers_cut_short(name):
    """A decoder cut after layer n predicts what the auxiliary loss of layer n must be computed on."""
    detector, images = built(name, auxiliary_loss=False), batch()
    with torch.no_grad():
        whole = detection_loss(detector.model, detector.family, images, auxiliary=True).total
        parts = []
        layers = detector.model.model.decoder.layers
        for count in range(1, len(layers) + 1):
            short = copy.deepcopy(detector.model)
            short.model.decoder.layers = nn.ModuleList(short.model.decoder.layers[:count])
            parts.append(short(pixel_values=images.pixel_values, labels=images.labels).loss)
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*FED_ON, *OTHERS])
def test_without_auxiliary_losses_it_is_the_last_layer_alone(name):
    detector, images = built(name), batch()
    detector.model.eval()
    with torch.no_grad():
        found = detection_loss(detector.model, detector.family, images, auxiliary=False)
        reference = copy.deepcopy(detector.model)
        reference.config.auxiliary_loss = False
        expected = reference(pixel_values=images.pixel_values, labels=images.labels).loss
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_families_with_their_own_auxiliary_losses_keep_them(name):
    """Denoising queries included, with the random state fixed."""
    detector, images = built(name), batch()
    detector.model.train()
    torch.manual_seed(5)
    found = detection_loss(detector.model, detector.family, images, auxiliary=True)
    torch.manual_seed(5)
    expected = detector.model(pixel_values=images.pixel_values, labels=images.labels)
    torch.testing.assert_close(found.total, expected.loss, rtol=1e-5, atol=1e-5)
    queries = detector.model.config.num_queries
    assert expected.logits.shape[1] > queries, "the denoising queries come on top"
    assert found.predictions.logits.shape[1] == queries
    torch.testing.assert_close(found.predictions.logits, expected.logits[:, -queries:])


@pytest.mark.parametrize("name", INSIDE)
def test_families_that_ask_the_flag_get_their_auxiliary_losses(name):
    detector, images = built(name, auxiliary_loss=False), batch()
    with torch.no_grad():
        found = detection_loss(detector.model, detector.family, images, auxiliary=True)
        reference = copy.deepcopy(detector.model)
        reference.config.auxiliary_loss = True
        expected = reference(
            pixel_values=images.pixel_values, pixel_mask=images.pixel_mask, labels=images.labels
        )
        plain = detector.model(pixel_values=images.pixel_values, pixel_mask=images.pixel_mask)
    torch.testing.assert_close(found.total, expected.loss)
    torch.testing.assert_close(found.predictions.logits, plain.logits, rtol=0, atol=0)
    assert detector.model.config.auxiliary_loss is False


@pytest.mark.parametrize("objects", [(0, 0), (0, 2)], ids=["no objects", "one empty image"])
@pytest.mark.parametrize("name", ["detr", "conditional_detr", *OTHERS])
def test_images_without_objects_give_finite_losses(name, objects):
    detector = built(name)
    detector.model.train()
    found = detection_loss(detector.model, detector.family, batch(objects), auxiliary=True)
    found.total.backward()
    assert torch.isfinite(found.total)


def test_predictions_without_denoising_are_taken_whole():
    detector, images = built("detr"), batch()
    with torch.no_grad():
        outputs = detector.model(pixel_values=images.pixel_values)
    assert predictions_of(outputs).logits.shape == outputs.logits.shape
