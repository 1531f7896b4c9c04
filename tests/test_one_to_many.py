"""Auxiliary queries: the real ones never notice them, and their loss is the family's own."""

import copy
from dataclasses import replace

import pytest
import torch
from quantized_detectors import float_model
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.data import Batch
from qdetr_cli.errors import RecipeError
from qdetr_cli.families import FAMILIES, family_of
from qdetr_cli.losses import DetectionLoss, detection_loss
from qdetr_cli.one_to_many import AuxiliaryQueries
from qdetr_cli.recipe import OneToMany

NAMES = ["detr", "conditional_detr", "table-transformer"]
REFUSED = sorted(set(FAMILIES) - set(NAMES))


def batch(copies: int = 1, objects: tuple[int, ...] = (2, 0, 1)) -> Batch:
    """Three images, one without objects and one with padding; every object `copies` times."""
    generator = torch.Generator().manual_seed(3)
    labels = []
    for count in objects:
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
        classes = torch.randint(0, 3, (count,), generator=generator)
        labels.append(
            {"class_labels": torch.cat([classes] * copies), "boxes": torch.cat([boxes] * copies, dim=0)}
        )
    mask = torch.ones(3, 64, 96, dtype=torch.int64)
    mask[2, :, 48:] = 0
    return Batch(
        pixel_values=torch.rand(3, 3, 64, 96, generator=generator),
        pixel_mask=mask,
        labels=labels,
        image_ids=[0, 1, 2],
        sizes=torch.tensor([[64, 96]] * 3),
    )


def queries_of(model: nn.Module, copies: int = 2) -> AuxiliaryQueries:
    torch.manual_seed(5)
    made = AuxiliaryQueries(model, family_of(model), OneToMany(copies=copies))
    with torch.no_grad():
        made.queries.add_(0.5 * torch.randn_like(made.queries))
    return made


def both(
    model: nn.Module, made: AuxiliaryQueries, given: Batch, auxiliary: bool
) -> tuple[DetectionLoss, torch.Tensor]:
    """The detection loss of the real queries, and the loss of the auxiliary ones."""
    with made.listening(model) as call:
        found = detection_loss(model, family_of(model), given, auxiliary=auxiliary)
    return found, made.loss(model, call, given.labels, auxiliary=auxiliary)


@pytest.mark.parametrize("auxiliary", [True, False], ids=["all layers", "last layer"])
@pytest.mark.parametrize("name", NAMES)
def test_their_loss_is_that_of_a_model_with_these_queries_on_repeated_objects(name, auxiliary):
    model, copies = float_model(name), 2
    made = queries_of(model, copies)
    _, many = both(model, made, batch(), auxiliary)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.query_position_embeddings.weight.copy_(made.queries)
    expected = detection_loss(twin, family_of(twin), batch(copies), auxiliary=auxiliary).total
    torch.testing.assert_close(many, expected)
    once = detection_loss(twin, family_of(twin), batch(1), auxiliary=auxiliary).total
    assert abs(float(once.detach() - expected.detach())) > 1e-3, "the copies matter"


@pytest.mark.parametrize("name", NAMES)
def test_real_queries_do_not_notice(name):
    """Predictions, features and loss to the last bit, also when everything is asked again afterwards."""
    model = float_model(name)
    plain = detection_loss(model, family_of(model), batch(), auxiliary=True)
    found, _ = both(model, queries_of(model), batch(), True)
    after = detection_loss(model, family_of(model), batch(), auxiliary=True)
    for each in (found, after):
        assert torch.equal(each.total, plain.total)
        assert torch.equal(each.predictions.logits, plain.predictions.logits)
        assert torch.equal(each.predictions.boxes, plain.predictions.boxes)
        assert all(map(torch.equal, each.predictions.co_attended, plain.predictions.co_attended))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.auxiliary_loss is False


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_queries_and_all_that_the_decoder_reads(name):
    model = float_model(name).train()
    made = queries_of(model)
    _, many = both(model, made, batch(), True)
    many.backward()
    assert made.queries.grad is not None
    assert bool(made.queries.grad.isfinite().all())
    assert all(bool(row.any()) for row in made.queries.grad), "every auxiliary query learns"
    assert model.model.query_position_embeddings.weight.grad is None, "the real ones take no part"
    moved = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"decoder", "encoder"} <= moved


def test_they_begin_about_the_models_own_and_apart_from_them():
    model = float_model("detr")
    own = model.model.query_position_embeddings.weight.detach()
    torch.manual_seed(0)
    made = AuxiliaryQueries(model, family_of(model), OneToMany())
    noise = (made.queries.detach() - own) / own.std()
    assert made.queries.shape == own.shape
    assert 0.7 < float(noise.std()) < 1.3
    assert made.queries.requires_grad
    assert list(made.state_dict()) == ["queries"], "the model itself is not part of it"


def test_more_copies_than_queries_leave_some_objects_out():
    model = float_model("detr")
    made = queries_of(model, copies=9)
    _, many = both(model, made, batch(), False)
    assert bool(many.isfinite())


def test_images_without_any_object():
    model = float_model("conditional_detr")
    _, many = both(model, queries_of(model), batch(objects=(0, 0, 0)), True)
    many.backward()
    assert bool(many.isfinite())


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_learned_query_embeddings_refuse(name):
    family = replace(FAMILIES[name])
    with pytest.raises(RecipeError, match=rf"train\.one_to_many: {name} has no learned query embedding"):
        AuxiliaryQueries(nn.Module(), family, OneToMany())


@pytest.mark.parametrize("name", NAMES)
def test_decoders_that_feed_on_normed_states_refuse(name):
    model = load_config_model(tiny_config(name) | {"auxiliary_loss": True}, None).model
    with pytest.raises(RecipeError, match=r"auxiliary_loss is true.*drop the key"):
        AuxiliaryQueries(model, family_of(model), OneToMany())


@pytest.mark.parametrize("name", NAMES)
def test_the_argument_is_the_one_that_the_decoder_is_called_with(name):
    model = load_config_model(tiny_config(name), None).model.eval()
    made = AuxiliaryQueries(model, family_of(model), OneToMany())
    with torch.no_grad(), made.listening(model) as call:
        model(pixel_values=torch.rand(2, 3, 64, 64))
    own = model.model.query_position_embeddings.weight
    assert torch.equal(call[made.argument], own.expand(2, *own.shape))
