"""Attention as captured graphs, in families whose attention is unlike: bmm, constants, no denoising."""

import copy

import pytest
import torch
from quantized_detectors import (
    check_all_take_part,
    check_equal_while_off,
    check_products_are_quantized,
    rewritten,
)

from qdetr_cli.attention import describe
from qdetr_cli.rewrite import set_enabled

NAMES = ["table-transformer", "dab-detr", "deformable_detr, two-stage", "d_fine, no denoising"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["pixels", "mask", "labels"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_float_model_while_off(name: str, kind: str, training: bool) -> None:
    check_equal_while_off(name, kind, training)


@pytest.mark.parametrize("name", NAMES)
def test_every_product_has_quantized_operands(name: str) -> None:
    check_products_are_quantized(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_quantizer_takes_part_and_none_sees_a_mask(name: str) -> None:
    check_all_take_part(name)


def test_without_denoising_one_signature_is_enough() -> None:
    attention = rewritten("d_fine, no denoising")[1].get_submodule("model.decoder.layers.0.self_attn")
    assert [describe(signature) for signature in attention.captured] == [
        "hidden_states (3-d), position_embeddings (3-d)"
    ]


def test_heads_do_not_share_steps_where_the_graph_folds_them_into_the_batch() -> None:
    """Three images, two heads: steps far too narrow and far too wide, each on its own head."""
    model = rewritten("table-transformer")[1]
    attention = copy.deepcopy(model.get_submodule("model.encoder.layers.0.self_attn")).eval()
    set_enabled(attention, None, False)
    given = {"hidden_states": torch.randn(3, 5, 16), "object_queries": torch.randn(3, 5, 16)}
    mixed: list[torch.Tensor] = []
    attention.out_proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
    attention(**given)
    attention.v_quantizer.enabled = True
    attention.v_quantizer._ready = True
    with torch.no_grad():
        attention.v_quantizer.step.copy_(torch.tensor([1e-6, 1e3]))
    attention(**given)
    before, after = mixed
    assert after[..., 8:].abs().max() == 0
    assert 0 < after[..., :8].abs().max() < before[..., :8].abs().max()
