"""What is recorded on the way: the same of float and fake-quant models, and computed again by hand."""

import copy

import pytest
import torch
from quantized_detectors import BITS, float_model, inputs
from tiny_detectors import CONFIGS, tiny_config
from torch import nn
from torch.nn import functional as F

from qdetr_cli.data import Batch
from qdetr_cli.families import family_of
from qdetr_cli.features import Features, cross_attentions, recorded
from qdetr_cli.losses import detection_loss
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import OP_SLOTS, Op, recipe_from_dict
from qdetr_cli.rewrite import rewrite, set_enabled
from qdetr_cli.trace import AttentionFacts, GraphFacts, LayerFacts

NAMES = [name for name, config in CONFIGS.items() if "decoder_layers" in config and "timm" not in name]
QUERIES = 7


def quantized(name: str) -> tuple[nn.Module, nn.Module]:
    """The float model, and the model with all cross-attention quantized, switched off."""
    reference = float_model(name)
    model = copy.deepcopy(reference)
    facts = facts_of(model)
    slots = {op: {slot: BITS[slot] for slot in OP_SLOTS[op]} for op in {"linear", facts.attentions[0].op}}
    rules = [{"op": op, **formats} for op, formats in sorted(slots.items())]
    rewrite(model, make_plan(recipe_from_dict({"schema": 1, "rules": rules}, source="t"), facts), facts)
    set_enabled(model, None, False)
    return reference, model


def facts_of(model: nn.Module) -> GraphFacts:
    """The facts of its cross-attention alone, without tracing the whole model."""
    family, role = family_of(model), {"aliases": (), "role": "decoder.cross_attention"}
    layers, attentions = [], []
    for path, attention in cross_attentions(model, family):
        deformable = bool(set(family.deformable) & {kind.__name__ for kind in type(attention).__mro__})
        op: Op = "deformable" if deformable else "attention"
        config = model.config
        heads = getattr(config, "decoder_attention_heads", None) or config.decoder_cross_attention_heads
        attentions.append(AttentionFacts(path=path, op=op, heads=heads, head_dim=8, macs=1, **role))
        for name, layer in attention.named_modules(prefix=path):
            if isinstance(layer, nn.Linear):
                shape = tuple(layer.weight.shape)
                inner = {"input_shape": (1, shape[1]), "output_shape": (1, shape[0]), "weight_shape": shape}
                counts = {"calls": 1, "macs": 1, "weights": 1, "weight_bypassed": False}
                layers.append(LayerFacts(path=name, op="linear", **inner, **counts, **role))
    assert attentions
    return GraphFacts(
        family=family.name,
        size=(64, 96),
        layers=tuple(layers),
        attentions=tuple(attentions),
        batch_norms=(),
        uncalled=(),
    )


def watched(model, given: dict) -> Features:
    with torch.no_grad(), recorded(model, family_of(model)) as features:
        model.eval()(**given)
    return features


@pytest.mark.parametrize("name", NAMES)
def test_float_and_fake_quant_models_give_the_same(name):
    """As many D as decoder layers, (B, Q, D), and the memory; to the last bit while quantizers are off."""
    reference, model = quantized(name)
    for kind in ("pixels", "mask"):
        expected, got = watched(reference, inputs(kind)), watched(model, inputs(kind))
        config = tiny_config(name)
        assert len(got.co_attended) == config["decoder_layers"]
        width = config.get("hidden_size", config["d_model"])
        assert [each.shape for each in got.co_attended] == [(3, QUERIES, width)] * config["decoder_layers"]
        assert all(torch.equal(*each) for each in zip(got.co_attended, expected.co_attended, strict=True))
        assert all(each.std() > 1e-3 for each in got.co_attended)
        assert not torch.equal(*got.co_attended), "each layer has its own"
        assert got.memory is not None
        assert got.memory.shape[::2] == (3, width)
        assert torch.equal(got.memory, expected.memory)


@pytest.mark.parametrize(
    "name", ["detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"]
)
def test_tokens_of_padding_are_masked(name):
    """A token whose cell lies in the padding alone is False; pixels decide, at the stride of each level."""
    model, given = float_model(name), inputs("mask")
    mask = watched(model, given).memory_mask
    assert mask is not None
    given["pixel_mask"] = torch.ones_like(given["pixel_mask"])
    given["pixel_mask"][:, :, given["pixel_mask"].shape[2] // 2 :] = 0
    half = watched(model, given).memory_mask
    assert half.shape == mask.shape
    assert 0.4 <= half.float().mean() <= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_layers_come_first_to_last(name):
    model = float_model(name)
    paths = [path for path, _ in cross_attentions(model, family_of(model))]
    assert [f".decoder.layers.{index}." in path for index, path in enumerate(paths)] == [True] * len(paths)


def test_hooks_are_gone_afterwards():
    model = float_model("detr")
    features = watched(model, inputs("pixels"))
    before = features.co_attended
    with torch.no_grad():
        model(**inputs("mask"))
    assert all(a is b for a, b in zip(features.co_attended, before, strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_dense_feature_is_softmax_of_the_products_times_v(layer):
    """Eq. 2.26 with the layer's own projections, head by head, padding masked."""
    model, given, call = float_model("detr"), inputs("mask"), {}
    attention = model.model.decoder.layers[layer].encoder_attn

    def keep(module, args, kwargs):
        call.update(zip(("hidden_states", "key_value_states"), args, strict=False))
        call.update(kwargs)

    attention.register_forward_pre_hook(keep, with_kwargs=True)
    features = watched(model, given)
    with torch.no_grad():
        x = call["hidden_states"] + call["position_embeddings"]
        memory = call["key_value_states"]
        q = attention.q_proj(x)
        k = attention.k_proj(memory + call["encoder_position_embeddings"])
        v = attention.v_proj(memory)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            scores = q[..., part] @ k[..., part].mT / 8**0.5
            heads.append(F.softmax(scores + call["attention_mask"][:, 0], dim=-1) @ v[..., part])
    torch.testing.assert_close(features.co_attended[layer], torch.cat(heads, dim=-1))
    assert torch.equal(features.memory, memory)


@pytest.mark.parametrize("layer", [0, 1])
def test_deformable_feature_is_the_weighted_sum_of_samples(layer):
    """Bilinear samples by hand: one image, query, head, level and point at a time."""
    model, given, call = float_model("deformable_detr"), inputs("pixels", 1), {}
    attention = model.model.decoder.layers[layer].encoder_attn

    def keep(module, args, kwargs):
        call.update(kwargs)
        call.setdefault("hidden_states", args[0] if args else kwargs["hidden_states"])

    attention.register_forward_pre_hook(keep, with_kwargs=True)
    features = watched(model, given)
    heads, levels, points = attention.n_heads, attention.n_levels, attention.n_points
    sizes = [tuple(size) for size in call["spatial_shapes_list"]]
    with torch.no_grad():
        x = call["hidden_states"] + call["position_embeddings"]
        value = attention.value_proj(call["encoder_hidden_states"]).view(
            -1, heads, attention.d_model // heads
        )
        weights = attention.attention_weights(x).view(QUERIES, heads, -1).softmax(-1)
        weights = weights.view(QUERIES, heads, levels, points)
        offsets = attention.sampling_offsets(x).view(QUERIES, heads, levels, points, 2)
    expected = torch.zeros(QUERIES, heads, attention.d_model // heads)
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(levels)]
    for query in range(QUERIES):
        for head in range(heads):
            for level, (height, width) in enumerate(sizes):
                cx, cy = call["reference_points"][0, query, level].tolist()
                grid = value[starts[level] : starts[level] + height * width, head].view(height, width, -1)
                for point in range(points):
                    dx, dy = offsets[query, head, level, point].tolist()
                    sample = bilinear(grid, cx * width + dx - 0.5, cy * height + dy - 0.5)
                    expected[query, head] += weights[query, head, level, point] * sample
    torch.testing.assert_close(features.co_attended[layer][0], expected.flatten(1), rtol=1e-4, atol=1e-4)


def bilinear(grid: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """The value of (height, width, d) at a point, in pixels from the first center; 0 outside."""
    left, top = int(x // 1), int(y // 1)
    total = torch.zeros(grid.shape[-1])
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
            total = total + (1 - abs(x - column)) * (1 - abs(y - row)) * grid[row, column]
    return total


@pytest.mark.parametrize("name", ["detr", "rt_detr", "d_fine"])
def test_predictions_in_training_hold_the_features_of_the_real_queries(name):
    """Denoising queries are left out, and gradients flow."""
    model, given = float_model(name).train(), inputs("labels")
    sizes = torch.tensor([[96, 64]] * 3)
    batch = Batch(**given, image_ids=[0, 1, 2], sizes=sizes)
    found = detection_loss(model, family_of(model), batch, auxiliary=True).predictions
    assert [each.shape[:2] for each in found.co_attended] == [(3, QUERIES)] * 2
    assert all(each.requires_grad for each in found.co_attended)
    assert found.memory is not None
    assert found.memory.requires_grad
