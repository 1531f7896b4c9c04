"""Backbones of transformers and of timm, each in a detector: loaded, planned, folded, quantized, trained."""

import copy
import json
import socket
from functools import cache
from typing import Any

import pytest
import torch
from quantized_detectors import inputs, run
from tiny_detectors import HGNET, tiny_config
from torch import nn

from qdetr_cli.attention import QuantAttention
from qdetr_cli.calibrate import set_ranges
from qdetr_cli.checkpoint import Detector, load_config_model, load_float
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import role_of
from qdetr_cli.fold import BATCH_NORMS, fold_batch_norms
from qdetr_cli.layers import QuantConv2d
from qdetr_cli.manifest import Manifest, load_weights, save_checkpoint
from qdetr_cli.models import Source, open_model
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.processors import Processor
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import Train, recipe_from_dict
from qdetr_cli.rewrite import rewrite, set_enabled
from qdetr_cli.schedule import freeze
from qdetr_cli.trace import GraphFacts, trace

THREE = {"out_features": ["stage2", "stage3", "stage4"]}
WINDOWS = {
    "embed_dim": 8,
    "depths": [1, 1, 2],  # the second of two is shifted
    "num_heads": [2, 2, 2],
    "window_size": 4,
    "image_size": 64,
    "out_features": ["stage1", "stage2", "stage3"],
}
CONVNEXT = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], **THREE}
LIVE = {"freeze_backbone_batch_norms": False}


def timm(name: str, *indices: int) -> dict[str, Any]:
    return {"model_type": "timm_backbone", "backbone": name, "out_indices": list(indices)}


BACKBONES: dict[
    str, tuple[dict[str, Any], tuple[int, int, int]]
] = {  # config, channels of its last three maps
    "hgnet_v2": (HGNET, (16, 16, 32)),
    "convnext": ({**CONVNEXT, "model_type": "convnext"}, (16, 16, 32)),
    "swin": ({**WINDOWS, "model_type": "swin"}, (8, 16, 32)),
    "swinv2": ({**WINDOWS, "model_type": "swinv2"}, (8, 16, 32)),
    "timm resnet": (timm("test_resnet", 2, 3, 4), (48, 192, 96)),
    "timm convnext": (timm("test_convnext", 1, 2, 3), (32, 48, 64)),
    "timm efficientnet": (timm("test_efficientnet", 2, 3, 4), (32, 48, 64)),
    "timm mobilenet": (timm("mobilenetv3_small_050", 2, 3, 4), (16, 24, 288)),
    "timm vit": (timm("test_vit", 5), (64, 64, 64)),
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # family, backbone, changes
    "detr, timm convnext": ("detr", "timm convnext", {}),
    "detr, timm vit": ("detr", "timm vit", {}),
    "detr, swinv2": ("detr", "swinv2", {}),
    "conditional_detr, timm efficientnet": ("conditional_detr", "timm efficientnet", {}),
    "conditional_detr, convnext": ("conditional_detr", "convnext", {}),
    "table-transformer, hgnet_v2": ("table-transformer", "hgnet_v2", {}),
    "dab-detr, timm resnet": ("dab-detr", "timm resnet", {}),
    "deformable_detr, swin": (
        "deformable_detr",
        "swin",
        {"decoder_layers": 2},
    ),  # transformers cannot tie one head
    "rt_detr, timm mobilenet": ("rt_detr", "timm mobilenet", LIVE),
}
ATTENTION = {"swin": 4, "swinv2": 4, "timm vit": 6}  # attention modules of a backbone
WITHOUT_BATCH_NORM = ("convnext", "swin", "vit")
SIZE = (64, 96)


def config_of(name: str) -> dict[str, Any]:
    family, backbone, changes = MODELS[name]
    config, channels = BACKBONES[backbone]
    small = {"backbone_config": dict(config), "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1}
    made = tiny_config(family) | small | changes
    if "encoder_in_channels" in made:
        made["encoder_in_channels"] = list(channels)
    return made


def build(config: dict[str, Any]) -> Detector:
    """A detector whose weights and statistics are far from their initial zeros and ones."""
    torch.manual_seed(0)
    detector = load_config_model(config, None)
    for key, value in detector.model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(std=0.3)
        elif value.is_floating_point() and value.dim() > 1:
            value.normal_(std=value[0].numel() ** -0.5)
    return detector


@cache
def rewritten(name: str) -> tuple[Detector, nn.Module, Plan, GraphFacts]:
    """The float detector, its fake-quant model, its plan and its facts."""
    return quantized(build(config_of(name)))


def quantized(detector: Detector) -> tuple[Detector, nn.Module, Plan, GraphFacts]:
    """The same, all layers and the backbone's attention at 8 bits; a detector's own is tested elsewhere."""
    facts = trace(detector.model, detector.family, SIZE)
    bits = {"bits": 8}
    rules: list[dict[str, Any]] = [{"op": ["linear", "conv"], "weight": bits, "input": bits}]
    if any(each.role == "backbone.attention" for each in facts.attentions):
        rules.append(
            {"op": "attention", "role": "backbone.attention", "q": bits, "k": bits, "v": bits, "probs": bits}
        )
    plan = make_plan(recipe_from_dict({"schema": 1, "rules": rules}, source="test"), facts)
    model = copy.deepcopy(detector.model)
    rewrite(model, plan, facts)
    return detector, model, plan, facts


@pytest.fixture(params=MODELS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def backbone_of(name: str) -> str:
    return MODELS[name][1]


# --- loading ---


def test_a_folder_loads_exactly_and_offline(name, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    detector = rewritten(name)[0]
    detector.model.save_pretrained(tmp_path)
    loaded = load_float(tmp_path)
    before, after = detector.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    expected, got = (run(each.model, inputs("pixels"), False) for each in (detector, loaded))
    assert expected.keys() == got.keys()
    for key in got:  # some processors add in another order where weights lie at other addresses
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["detr", "rt_detr"])
def test_timm_networks_with_channels_last_are_refused(family):
    config = tiny_config(family) | {"backbone_config": timm("test_mambaout", 1, 2, 3)}
    with pytest.raises(
        CheckpointError, match=r"test_mambaout: timm gives its feature maps with channels last"
    ):
        load_config_model(config, None)


def test_activations_that_transformers_loses_are_said():
    """In transformers a frozen batch norm takes the place of timm's, which activates too."""
    frozen, live = (
        load_config_model(config_of("rt_detr, timm mobilenet") | {"freeze_backbone_batch_norms": each}, None)
        for each in (True, False)
    )
    assert any("without the activations that timm has in 22 of them" in note for note in frozen.notes)
    assert not any("activations" in note for note in live.notes)
    assert not any("activations" in note for note in build(config_of("dab-detr, timm resnet")).notes)


# --- plan ---


def test_every_layer_of_a_backbone_is_planned_under_its_role(name):
    detector, _, plan, facts = rewritten(name)
    own = [
        path
        for path, module in detector.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and role_of(detector.family, path).startswith("backbone")
    ]
    planned = {
        module.path: module
        for module in plan.modules
        if module.role.startswith("backbone") and module.op != "residual"
    }
    assert own
    assert set(own) == {path for path, module in planned.items() if module.op in ("linear", "conv")}
    assert all(not module.is_float for module in planned.values())
    stem = [path for path, module in planned.items() if module.role == "backbone.stem"]
    assert stem
    assert own[0] in stem
    assert len(stem) < len(own)
    assert not facts.notes


def test_dense_attention_of_a_backbone_is_quantized(name):
    _, model, plan, _ = rewritten(name)
    found = [m for m in plan.modules if m.op == "attention" and m.role.startswith("backbone")]
    assert len(found) == ATTENTION.get(backbone_of(name), 0)
    for module in found:
        assert module.role == "backbone.attention"
        attention = model.get_submodule(module.path)
        assert isinstance(attention, QuantAttention)
        assert all(module.format(slot) is not None for slot in ("q", "k", "probs", "v"))


def test_attention_that_cannot_be_quantized_is_said():
    """PVT calls its attention with the size of the image as numbers; a fused call shows no products."""
    pvt = {
        "model_type": "pvt_v2",
        "hidden_sizes": [8, 16, 32, 64],
        "depths": [1] * 4,
        "out_features": ["stage4"],
    }
    detector = load_config_model(
        tiny_config("detr") | {"backbone_config": pvt | {"num_attention_heads": [1, 2, 2, 2]}}, None
    )
    facts = trace(detector.model, detector.family, SIZE)
    assert sum("its products stay float" in note for note in facts.notes) == 4
    fused = build(config_of("detr, timm vit"))
    for module in fused.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    facts = trace(fused.model, fused.family, SIZE)
    assert sum("in one fused call: its products stay float" in note for note in facts.notes) == 6


def test_depthwise_convolutions_have_a_step_per_channel(name):
    _, model, _, _ = rewritten(name)
    depthwise = [m for m in model.modules() if isinstance(m, QuantConv2d) and m.groups == m.in_channels > 1]
    expected = {"convnext", "convnextv2", "timm convnext", "timm efficientnet", "timm mobilenet", "hgnet_v2"}
    assert bool(depthwise) == (backbone_of(name) in expected)
    for conv in depthwise:
        assert conv.weight_quantizer.step.numel() == conv.out_channels


# --- folding ---


def test_no_batch_norm_is_left(name):
    detector, model, _, facts = rewritten(name)
    kinds = detector.family.frozen_batch_norm
    left = [p for p, m in model.named_modules() if type(m) in BATCH_NORMS or type(m).__name__ in kinds]
    assert not left
    folded = [norm for _, norm in facts.batch_norms if role_of(detector.family, norm).startswith("backbone")]
    assert bool(folded) != backbone_of(name).removeprefix("timm ").startswith(WITHOUT_BATCH_NORM)


@pytest.mark.parametrize("kind", ["pixels", "labels"])
def test_quantizers_off_is_the_float_model(name, kind):
    """To the last bit once batch norms are folded; at another size than the captured."""
    detector, model, _, facts = rewritten(name)
    folded = copy.deepcopy(detector.model)
    fold_batch_norms(folded, facts.batch_norms)
    set_enabled(model, None, False)
    exact, got = (run(each, inputs(kind), kind == "labels") for each in (folded, model))
    assert got.keys() == exact.keys()
    assert all(torch.equal(value, exact[key]) for key, value in got.items())


@torch.no_grad()
def test_folding_changes_nothing_but_rounding(name):
    """The maps of the backbone in float64; in float32 a rounding can let queries change places."""
    detector, _, _, facts = rewritten(name)
    exact = copy.deepcopy(detector.model).double()
    folded = copy.deepcopy(exact)
    fold_batch_norms(folded, facts.batch_norms)
    pixels = inputs("pixels")["pixel_values"].double()
    expected, got = (maps_of(each, pixels) for each in (exact, folded))
    assert len(expected) >= 1
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def maps_of(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The feature maps that a backbone gives."""
    (encoder,) = [m for path, m in model.named_modules() if type(m).__name__.endswith("ConvEncoder")]
    return [features for features, _ in encoder(pixels, torch.ones_like(pixels[:, 0]))]


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (160, 224), (288, 320)], ids=str)
def test_windows_are_counted_anew_at_each_size(size):
    """From one window in the last stage to many: none of the counts is written into a graph."""
    detector, model, _, facts = rewritten("deformable_detr, swin")
    folded = copy.deepcopy(detector.model)
    fold_batch_norms(folded, facts.batch_norms)
    set_enabled(model, None, False)
    for batch in (1, 2):
        given = inputs("pixels", batch=batch, size=size)
        exact, got = (run(each, given, False) for each in (folded, model))
        assert all(torch.equal(value, exact[key]) for key, value in got.items())


def test_a_wide_window_is_captured_with_more_than_one_window():
    config = config_of("deformable_detr, swin")
    config["backbone_config"] |= {"window_size": 12}
    detector, model, _, _ = quantized(build(config))
    set_enabled(model, None, False)
    for size in ((96, 128), (192, 256)):
        given = inputs("pixels", batch=1, size=size)
        exact, got = (run(each, given, False) for each in (detector.model, model))
        assert all(torch.allclose(value, exact[key], atol=1e-4) for key, value in got.items())


# --- calibration, training, checkpoints ---


@cache
def trained(name: str) -> nn.Module:
    """The fake-quant model, calibrated, after one step of training."""
    detector, model, _, _ = rewritten(name)
    model = copy.deepcopy(model)
    set_enabled(model, None, True)
    assert set_ranges(model, lambda: model(**inputs("pixels"))) == ()
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, detector.family, Train(lr=1e-5, backbone_lr=1e-5)))
    loss = model(**inputs("labels")).loss
    loss.backward()
    optimizer.step()
    return model.eval()


def test_calibrated_and_trained(name):
    """Each quantizer has a range and a gradient, squeeze-and-excitation on maps of one cell included."""
    detector, before, _, _ = rewritten(name)
    model = trained(name)
    steps = {key: value for key, value in model.named_parameters() if key.endswith("_quantizer.step")}
    assert steps
    assert all(value.isfinite().all() for value in steps.values())
    backbone = [key for key in steps if role_of(detector.family, key).startswith("backbone")]
    assert all(steps[key].grad is not None for key in backbone)
    old = dict(before.named_parameters())
    moved = [
        key for key, value in model.named_parameters() if key in old and not torch.equal(value, old[key])
    ]
    assert any(role_of(detector.family, key) == "backbone.stem" for key in moved)
    quantized = run(model, inputs("pixels"), False)[".logits"]
    assert quantized.isfinite().all()


def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    detector, _, plan, facts = rewritten(name)
    model = trained(name)
    manifest = Manifest(
        kind="fake-quant",
        family=detector.family.name,
        recipe=json.loads(json.dumps({"schema": 1})),
        plan=plan.to_dict(),
        facts=facts.to_dict(),
        class_names=detector.class_names,
        processor=Processor().to_config(),
        config=json.loads(detector.model.config.to_json_string(use_diff=False)),
        source="test",
        versions={},
        metrics=None,
    )
    save_checkpoint(tmp_path / "saved", model, manifest)
    loaded = open_model(Source(model=str(tmp_path / "saved")), lambda text: None).module
    load_weights(tmp_path / "saved", loaded)
    expected, got = (run(each, inputs("pixels"), False) for each in (model, loaded))
    assert all(torch.equal(got[key], expected[key]) for key in got)


# --- what learns ---


@pytest.mark.parametrize("name", ["table-transformer, hgnet_v2", "dab-detr, timm resnet"], ids=str)
def test_the_stem_learns_until_a_recipe_freezes_it(name):
    """transformers freezes it for some backbones and not for others; here its module path decides."""
    model = copy.deepcopy(rewritten(name)[0].model)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".backbone." in f".{n}")
    timm_paths = ("model.backbone.*model*.conv1", "model.backbone.*model*.layer1")
    own_paths = ("model.backbone.*model.embedder", "model.backbone.*model.encoder.stages.0")
    assert freeze(model, timm_paths if "timm" in name else own_paths) == ()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(n.startswith("model.backbone.") for n in frozen)
