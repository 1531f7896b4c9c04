"""Families with a vision transformer for a backbone, or for the whole detector: quantized throughout."""

import copy

import pytest
import torch
from quantized_detectors import check_family, inputs, ready, rewritten, run
from torch import nn

from qdetr_cli.attention import QuantAttention
from qdetr_cli.layers import QuantConvTranspose2d
from qdetr_cli.recording import describe
from qdetr_cli.rewrite import quantizers, set_enabled

NAMES = ["yolos", "lw_detr", "rf_detr", "deimv2-vit"]


@pytest.mark.parametrize("name", NAMES)
def test_is_exact_and_quantized_throughout(name: str) -> None:
    check_family(name)


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str) -> None:
    """Every step and offset gets a finite gradient from the family's own loss, most of them not 0."""
    model = copy.deepcopy(ready(name)).train()
    model(**inputs("labels")).loss.backward()
    gradients = [p.grad for q in quantizers(model).values() for p in q.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > 0.6 * len(gradients)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("yolos", {"encoder.attention": 2}),
        ("lw_detr", {"backbone.attention": 2, "decoder.self_attention": 2, "decoder.cross_attention": 2}),
        ("rf_detr", {"backbone.attention": 2, "decoder.self_attention": 2, "decoder.cross_attention": 2}),
        (
            "deimv2-vit",
            {
                "backbone.attention": 2,
                "encoder.attention": 1,
                "decoder.self_attention": 2,
                "decoder.cross_attention": 2,
            },
        ),
    ],
    ids=str,
)
def test_attention_of_the_backbone_has_a_role_of_its_own(name: str, roles: dict[str, int]) -> None:
    found = [each.role for each in rewritten(name)[3].attentions]
    assert {role: found.count(role) for role in found} == roles


@pytest.mark.parametrize("name", ["lw_detr", "rf_detr"])
def test_groups_of_queries_attend_to_their_own_group_in_training_alone(name: str) -> None:
    """Three groups of seven: a graph for each mode, and what one group is told does not reach another."""
    model = rewritten(name)[1]
    set_enabled(model, None, False)
    attention = model.get_submodule("model.decoder.layers.0.self_attn")
    assert [describe(signature) for signature in attention.captured] == [
        "hidden_states (3-d), position_embeddings (3-d), training (True)",
        "hidden_states (3-d), position_embeddings (3-d), training (False)",
    ]
    given = {"hidden_states": torch.randn(5, 21, 32), "position_embeddings": torch.randn(5, 21, 32)}
    changed = {name: each.clone() for name, each in given.items()}
    changed["hidden_states"][:, 14:] += 1
    attention.train()
    attention.attention_dropout = 0.0
    moved = (attention.eval()(**given)[0] - attention(**changed)[0]).abs().amax((0, 2))
    assert moved.gt(1e-4).all()


def test_windows_and_whole_images_share_one_graph() -> None:
    """Layers with and without windows are built alike: one graph of free batch and token counts."""
    model = rewritten("lw_detr")[1]
    layers = model.get_submodule("model.backbone.backbone.encoder.layer")
    inside, across = (layer.attention for layer in layers)
    assert isinstance(inside, QuantAttention)
    assert [list(each.captured) for each in (inside, across)] == [[(("hidden_states", "3-d"),)]] * 2


def test_transposed_convolutions_have_a_step_per_output_channel() -> None:
    model = ready("lw_detr")
    layers = [each for each in model.modules() if isinstance(each, nn.ConvTranspose2d)]
    assert len(layers) == 2
    for layer in layers:
        assert isinstance(layer, QuantConvTranspose2d)
        assert layer.weight_quantizer.step.numel() == layer.out_channels == 16
        step = layer.weight_quantizer.step.detach()[None, :, None, None]
        codes = (layer.weight / step).round().clamp(-8, 7)
        x = torch.randn(2, 32, 3, 5)
        got = layer(x)
        layer.input_quantizer.enabled = False
        assert torch.equal(
            layer(x), nn.functional.conv_transpose2d(x, codes * step, layer.bias, stride=layer.stride)
        )
        layer.input_quantizer.enabled = True
        assert got.shape == (2, 16, 6, 10)


def test_an_other_size_in_each_direction() -> None:
    """Position embeddings are interpolated; sides are what `divisible` says, and no others."""
    for name in ("yolos", "rf_detr"):
        reference, model, _, _ = rewritten(name)
        set_enabled(model, None, False)
        for size in ((64, 64), (32, 160)):
            given = inputs("mask", 2, size)
            assert torch.equal(run(model, given, False)[".logits"], run(reference, given, False)[".logits"])
