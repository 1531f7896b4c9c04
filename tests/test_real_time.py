"""The RT-DETR line: discrete sampling, light encoders, and PP-DocLayout, which cannot be trained."""

import pytest
import torch
from quantized_detectors import check_family, ready, rewritten
from torch.nn import functional as F

from qdetr_cli.rewrite import quantizers

NAMES = ["rt_detr_v2", "rt_detr_v2-discrete", "deimv2", "deimv2-lite", "pp_doclayout_v2", "pp_doclayout_v3"]


@pytest.mark.parametrize("name", NAMES)
def test_is_exact_and_quantized_throughout(name: str) -> None:
    check_family(name)


def test_discrete_sampling_reads_the_quantized_values() -> None:
    """On one level, by hand: the cell that a location falls into, on the grid of its head, weighted."""
    model = ready("rt_detr_v2-discrete").eval()
    attention = model.get_submodule("model.decoder.layers.0.encoder_attn")
    sizes, queries = [(2, 3), (1, 2), (1, 1)], torch.randn(2, 5, 16)
    memory = torch.randn(2, 9, 16)
    boxes = torch.rand(2, 5, 1, 4) * 0.5 + 0.25
    got, probs = attention(
        hidden_states=queries,
        encoder_hidden_states=memory,
        reference_points=boxes,
        spatial_shapes=torch.tensor(sizes),
        spatial_shapes_list=sizes,
    )
    offsets = attention.sampling_offsets(queries).view(2, 5, 2, 12, 2)
    places = boxes[:, :, None, :, :2] + offsets * 0.25 * boxes[:, :, None, :, 2:] * attention.offset_scale
    value = attention.v_quantizer(
        attention.value_proj(memory).view(2, 9, 2, 8).transpose(1, 2)
    )  # (B, N, L, d)
    mixed, start = torch.zeros(2, 5, 2, 8), 0
    for level, (height, width) in enumerate(sizes):
        for point in range(4 * level, 4 * level + 4):
            cells = (places[:, :, :, point] * torch.tensor([width, height]) + 0.5).to(torch.int64)
            x, y = cells[..., 0].clamp(0, width - 1), cells[..., 1].clamp(0, height - 1)  # (B, Q, N)
            index = (start + y * width + x).transpose(1, 2)[..., None].expand(-1, -1, -1, 8)
            read = value.gather(2, index).transpose(1, 2)  # (B, Q, N, d)
            mixed += probs[..., point, None] * read
        start += height * width
    logits = attention.attention_weights(queries).view(2, 5, 2, 12)
    assert torch.equal(probs, attention.probs_quantizer(F.softmax(logits, -1)))
    torch.testing.assert_close(got, attention.output_proj(mixed.flatten(2)), rtol=1e-4, atol=1e-5)


def test_auxiliary_heads_stay_float_and_the_plan_says_why() -> None:
    """DEIMv2's first decoder layer has a class head and a quality head for its own loss alone."""
    _, model, plan, facts = rewritten("deimv2")
    reasons = {module.path: module.reason for module in plan.modules if module.reason}
    assert reasons == dict.fromkeys(
        (
            "model.decoder.lqe_layers.0.reg_conf.layers.0",
            "model.decoder.lqe_layers.0.reg_conf.layers.1",
            "model.decoder.class_embed.0",
        ),
        "called in training alone: no prediction depends on it",
    )
    assert set(reasons) == set(facts.uncalled)
    assert not any(path.startswith(tuple(reasons)) for path in quantizers(model))
