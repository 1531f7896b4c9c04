"""Attention as captured graphs, in families whose attention is unlike: bmm, constants, no denoising."""

import copy

import pytest
import torch
from quantized_detectors import check_family, float_model, inputs, rewritten

from qdetr_cli.recording import Signature, bind, describe, record_calls, signature_of
from qdetr_cli.rewrite import set_enabled

NAMES = [
    "table-transformer",
    "dab-detr",
    "deformable_detr",
    "deformable_detr-box_refine",
    "deformable_detr, two-stage",
    "d_fine, no denoising",
]


@pytest.mark.parametrize("name", NAMES)
def test_is_exact_and_quantized_throughout(name: str) -> None:
    check_family(name)


def test_dab_detrs_box_head_is_one_module_with_two_names() -> None:
    """Its copy in the decoder has the same parameters: both names call the same quantized layers."""
    _, model, plan, _ = rewritten("dab-detr")
    heads = [module for module in plan.modules if module.role.startswith("box_head")]
    assert [(module.aliases, module.reason) for module in heads] == [
        ((f"bbox_predictor.layers.{layer}",), "") for layer in range(3)
    ]
    assert model.bbox_predictor.layers[0] is model.model.decoder.bbox_embed.layers[0]


def test_without_denoising_one_signature_is_enough() -> None:
    attention = rewritten("d_fine, no denoising")[1].get_submodule("model.decoder.layers.0.self_attn")
    assert [describe(signature) for signature in attention.captured] == [
        "hidden_states (3-d), position_embeddings (3-d)"
    ]


def test_a_call_with_a_mask_may_come_without() -> None:
    """PP-DocLayout masks queries that it finds uncertain; where none is, transformers drops the mask."""
    model = float_model("pp_doclayout_v2")
    path = "reading_order.encoder.layer.0.attention.self"
    model.config.class_thresholds = [2.0, 2.0, 2.0]  # noise is never that certain
    calls = record_calls(model, [path])[path]
    assert {"attention_mask" in arguments for arguments in calls.values()} == {True, False}
    model.config.class_thresholds = [0.0, 0.0, 0.0]
    seen: list[Signature] = []
    module = model.get_submodule(path)
    module.register_forward_pre_hook(
        lambda _, args, given: seen.append(signature_of(bind(module.forward, args, given))), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs("pixels"))
    assert (seen[0], False) in calls


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
