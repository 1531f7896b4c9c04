"""Attention as captured graphs, in families whose attention is unlike: bmm, constants, no denoising."""

import copy

import pytest
import torch
from quantized_detectors import (
    check_all_take_part,
    check_equal_while_off,
    check_products_are_quantized,
    ready,
    rewritten,
)
from torch import nn
from torch.nn import functional as F

from qdetr_cli.errors import RunError
from qdetr_cli.families import family_of
from qdetr_cli.rewrite import rewrite, set_enabled

NAMES = ["table-transformer", "dab-detr", "deformable_detr, two-stage", "d_fine, no denoising", "deimv2"]


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


def test_denoising_needs_two_signatures() -> None:
    _, model, _, _ = rewritten("d_fine")
    _, without, _, _ = rewritten("d_fine, no denoising")
    path = "model.decoder.layers.0.self_attn"
    assert len(model.get_submodule(path).captured) == 2
    assert len(without.get_submodule(path).captured) == 1


def test_a_call_that_was_never_captured_is_refused() -> None:
    attention = rewritten("detr")[1].get_submodule("model.encoder.layers.0.self_attn")
    with pytest.raises(
        RunError, match=r"encoder\.layers\.0\.self_attn: called with hidden_states \(3-d\), but"
    ):
        attention(hidden_states=torch.zeros(2, 4, 16))


def test_quantized_attention_computes_what_its_equation_says() -> None:
    """METHOD 2: A = softmax(Q(q) Q(k)^T / sqrt(d)), D = Q(A) Q(v), each head with its own step, by slices."""
    attention = ready("detr").get_submodule("model.encoder.layers.0.self_attn").eval()
    x, position = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    got, probs = attention(hidden_states=x, position_embeddings=position)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * (head + 1))
        q, k = (
            rounded(attention, s, getattr(attention, f"{s}_proj")(x + position)[..., part], head)
            for s in "qk"
        )
        v = rounded(attention, "v", attention.v_proj(x)[..., part], head)
        weights = rounded(attention, "probs", F.softmax(q @ k.mT / 8**0.5, dim=-1), head)
        torch.testing.assert_close(probs[:, head], weights)
        heads.append(weights @ v)
    torch.testing.assert_close(got, attention.o_proj(torch.cat(heads, dim=-1)))


def rounded(attention: nn.Module, slot: str, x: torch.Tensor, head: int) -> torch.Tensor:
    """x on the grid of one head, from the numbers of the quantizer alone."""
    quantizer = getattr(attention, f"{slot}_quantizer")
    step, zero = quantizer.step[head], quantizer.zero_point()[head]
    low, high = quantizer.format.qmin, quantizer.format.qmax
    return ((x / step).round() + zero).clamp(low, high).sub(zero) * step


@pytest.mark.parametrize("name", ["detr", "table-transformer"])
def test_heads_do_not_share_steps(name: str) -> None:
    """Also where the graph folds heads into the batch: only the head whose step is broken changes."""
    attention = copy.deepcopy(rewritten(name)[1].get_submodule("model.encoder.layers.0.self_attn")).eval()
    set_enabled(attention, None, False)
    position = "object_queries" if name == "table-transformer" else "position_embeddings"
    given = {"hidden_states": torch.randn(3, 5, 16), position: torch.randn(3, 5, 16)}
    if name == "table-transformer":
        given["output_attentions"] = True
    (attention.o_proj if name == "detr" else attention.out_proj).register_forward_pre_hook(
        lambda _, args: mixed.append(args[0])
    )
    mixed: list[torch.Tensor] = []
    attention(**given)
    attention.v_quantizer.enabled = True
    attention.v_quantizer._ready = True
    with torch.no_grad():
        attention.v_quantizer.step.copy_(torch.tensor([1e-6, 1e3]))
    attention(**given)
    before, after = mixed
    assert after[..., 8:].abs().max() == 0
    assert 0 < after[..., :8].abs().max() < before[..., :8].abs().max()


def test_capture_leaves_mode_and_random_state_alone() -> None:
    reference, _, plan, facts = rewritten("conditional_detr")
    model = copy.deepcopy(reference).eval()
    model.model.decoder.train()
    before, modes = torch.random.get_rng_state(), {k: m.training for k, m in model.named_modules()}
    rewrite(model, plan, facts, family_of(model))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training == modes[path] for path, module in model.named_modules() if path in modes)
