"""RT-DETR, RT-DETRv2 and D-FINE files: predictions of the original code, structure, choices, refusals.

The pinned numbers are what the original repositories' code computes from the state dicts of `original_line`.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from original_line import original_state, picture

from qdetr_cli.checkpoint import load_float
from qdetr_cli.errors import CheckpointError
from qdetr_cli.original import read_original
from qdetr_cli.original.hybrid import ratio

QUERIES = (0, 5, 11)
# fmt: off
PINNED = {  # case: (kind, options, settings, logits of three queries, their boxes)
    "RT-DETR": ("v1", {}, {},
        [-0.36823, 0.09912, -0.32247, -0.21318, -1.18572, -0.08715, 0.16126, -0.37318, -0.09451,
         -1.00736, -0.13499, 0.16555, -0.42803, -0.05778, -1.02971],
        [0.32966, 0.69852, 0.10614, 0.13374, 0.13777, 0.0288, 0.05118, 0.03683, 0.02055,
         0.11486, 0.05051, 0.04218]),
    "RT-DETR R50-m": ("v1", {"backbone": "bottleneck", "layers": 6}, {},
        [-0.43036, 0.07648, -0.27143, -0.21402, -1.03736, -0.18891, 0.08304, -0.30385, -0.0839,
         -0.90669, -0.19056, 0.04193, -0.24963, -0.11582, -0.94651],
        [0.36817, 0.60995, 0.1242, 0.12394, 0.1934, 0.02804, 0.06297, 0.03401, 0.81247,
         0.02941, 0.06933, 0.03345]),
    "RT-DETRv2": ("v2", {}, {},
        [0.01372, -0.36249, -0.58659, 1.2765, -1.46089, 0.01189, -0.36813, -0.60123, 1.27522,
         -1.46046, 0.03642, -0.39577, -0.60412, 1.27905, -1.48015],
        [0.92501, 0.55071, 0.00888, 0.0194, 0.92443, 0.26731, 0.00926, 0.01986, 0.48137,
         0.95995, 0.00954, 0.01931]),
    "RT-DETRv2 HGNetV2, two points": ("v2", {"backbone": "hgnet", "points": (2, 2, 2), "layers": 2}, {},
        [-0.56606, 1.34024, -0.12521, -0.31451, -0.56289, -0.60396, 1.38009, -0.15271, -0.32282,
         -0.57353, -0.68669, 1.34621, -0.14665, -0.46075, -0.35826],
        [0.4036, 0.4012, 0.01382, 0.03063, 0.75033, 0.7431, 0.01326, 0.03236, 0.95556,
         0.95287, 0.01467, 0.04342]),
    "RT-DETRv2 discrete": ("v2", {}, {"decoder_method": "discrete"},
        [-0.03708, -0.371, -0.544, 1.32479, -1.40466, -0.04271, -0.36979, -0.55418, 1.31818,
         -1.40411, -0.01502, -0.39341, -0.55726, 1.30491, -1.44661],
        [0.92748, 0.54789, 0.00782, 0.01781, 0.92682, 0.26706, 0.00796, 0.01793, 0.50888,
         0.95934, 0.00802, 0.01762]),
    "D-FINE": ("d_fine", {"backbone": "hgnet", "points": (3, 6, 3)}, {},
        [-0.36011, 0.61563, -0.84326, -0.35618, -1.12062, -0.19936, 0.68674, -1.18374, 0.03453,
         -0.81718, -0.15412, 0.69798, -1.15774, 0.06403, -0.9045],
        [0.71228, 0.87283, 0.14995, 0.09574, 0.06991, 0.89931, 0.04973, 0.02262, 0.58587,
         0.11152, 0.05336, 0.02066]),
    "D-FINE N, two levels": ("d_fine", {"backbone": "hgnet", "points": (6, 6), "layers": 2}, {},
        [-0.26476, 1.42151, 0.05721, -2.10373, -0.9656, -0.2938, 1.41986, 0.01338, -2.12308,
         -1.01652, -0.70634, 1.16905, -0.24118, -1.61164, -0.7683],
        [0.80232, 0.20598, 0.05363, 0.01364, 0.49803, 0.19886, 0.05422, 0.01325, 0.73179,
         0.46835, 0.16185, 0.03874]),
}
# fmt: on


@cache
def state(kind: str, **options: object) -> dict[str, torch.Tensor]:
    return original_state(kind, **options)


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("kind", "options", "settings", "logits", "boxes"), PINNED.values(), ids=PINNED)
@torch.no_grad()
def test_predictions_are_those_of_the_original_code(tmp_path, kind, options, settings, logits, boxes):
    path = written(tmp_path / "x.pth", {"model": original_state(kind, **options)})
    outputs = load_float(path, queries=12, **settings).model(pixel_values=picture())
    chosen = list(QUERIES)
    torch.testing.assert_close(outputs.logits[0, chosen].flatten(), torch.tensor(logits), rtol=0, atol=3e-5)
    torch.testing.assert_close(
        outputs.pred_boxes[0, chosen].flatten(), torch.tensor(boxes), rtol=0, atol=3e-5
    )


@pytest.mark.parametrize("kind", ["v1", "v2", "d_fine"])
def test_each_head_keeps_its_layer(tmp_path, kind):
    """Only the last layer's heads predict, so predictions cannot tell whether the others were mixed up."""
    points = (3, 6, 3) if kind == "d_fine" else (4, 4, 4)
    original = original_state(kind, backbone="hgnet" if kind != "v1" else "basic", points=points)
    own = load_float(written(tmp_path / "x.pth", {"model": original})).model.state_dict()
    for index in range(3):
        for head, ours in (("dec_score_head", "class_embed"), ("dec_bbox_head", "bbox_embed")):
            names = [name for name in original if name.startswith(f"decoder.{head}.{index}.")]
            assert names
            for name in names:
                inner = name.removeprefix(f"decoder.{head}.")
                assert torch.equal(own[f"model.decoder.{ours}.{inner}"], original[name])
                if kind != "v1":  # transformers has them under a second name
                    assert torch.equal(own[f"{ours}.{inner}"], original[name])
    assert torch.equal(
        own["model.denoising_class_embed.weight"], original["decoder.denoising_class_embed.weight"]
    )


def test_averaged_weights_are_preferred_and_it_is_said(tmp_path):
    averaged = state("v1")
    content = {"model": {k: v * 0 for k, v in averaged.items()}, "ema": {"module": averaged, "updates": 9}}
    path = written(tmp_path / "x.pth", {**content, "date": "2024", "last_epoch": 3})
    found = read_original(path)
    assert torch.equal(found.state["model.enc_score_head.bias"], averaged["decoder.enc_score_head.bias"])
    assert found.notes[0] == (
        "the file holds weights under ema.module, model: ema.module, the averaged ones, is used"
    )
    plain = read_original(path, weights="model")
    assert not plain.state["model.enc_score_head.bias"].any()
    with pytest.raises(
        CheckpointError, match=r"no weights under 'ema_model'; it has them under ema.module, model"
    ):
        read_original(path, weights="ema_model")


def test_structure_is_read_from_shapes(tmp_path):
    options = {"backbone": "hgnet", "points": (3, 6, 3), "classes": 7, "width": 48, "ffn": 40, "inner": 12}
    config = read_original(written(tmp_path / "x.pth", {"model": original_state("d_fine", **options)})).config
    wanted = {
        "d_model": 48,
        "encoder_ffn_dim": 40,
        "decoder_layers": 3,
        "decoder_n_points": [3, 6, 3],
        "decoder_attention_heads": 8,
        "max_num_bins": 32,
        "reg_scale": 4.0,
        "hidden_expansion": 0.5,
        "feat_strides": [8, 16, 32],
    }
    assert {name: config[name] for name in wanted} == wanted
    assert len(config["id2label"]) == 7
    assert config["backbone_config"]["stage_light_block"] == [False, False, True, True]


def test_an_integer_reg_scale_becomes_a_float(tmp_path):
    original = original_state("d_fine", backbone="hgnet")
    assert original["decoder.reg_scale"].dtype == torch.int64  # as `reg_scale: 4` in the configs makes it
    found = read_original(written(tmp_path / "x.pth", {"model": original}))
    assert found.state["model.decoder.reg_scale"].dtype == torch.float32


def test_a_head_of_eighty_classes_is_cocos(tmp_path):
    names = read_original(written(tmp_path / "x.pth", {"model": original_state("v1", classes=80)})).config[
        "id2label"
    ]
    assert (len(names), names[0], names[79]) == (80, "person", "toothbrush")


def test_r50_m_stops_after_its_third_layer_unless_told_otherwise(tmp_path):
    path = written(tmp_path / "x.pth", {"model": original_state("v1", backbone="bottleneck", layers=6)})
    found = read_original(path)
    assert found.config["decoder_layers"] == 3
    assert "decoder layers 4 to 6 are left out" in found.notes[0]
    assert read_original(path, decoder_layers=6).config["decoder_layers"] == 6
    with pytest.raises(CheckpointError, match="decoder_layers 7 is not from 1 to 6"):
        read_original(path, decoder_layers=7)


def changed(kind: str, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    names = {name.replace("__", "."): value for name, value in tensors.items()}
    content = {**state(kind, **({"backbone": "hgnet"} if kind == "d_fine" else {})), **names}
    return {name: value for name, value in content.items() if value is not None}


REFUSED = {
    "learned queries": (
        changed("v1", decoder__tgt_embed__weight=torch.zeros(3, 32)),
        {},
        "learned query contents",
    ),
    "agnostic selection": (
        changed("v2", decoder__enc_score_head__weight=torch.zeros(1, 32)),
        {},
        "class-agnostic score",
    ),
    "two values of one": (
        changed("d_fine", decoder__decoder__up=torch.tensor([0.7])),
        {},
        "two tensors for model.decoder.up",
    ),
    "heads": (state("v1"), {"heads": 5}, "5 heads do not divide the encoder's width 32"),
    "heads that the file says": (state("v2"), {"heads": 4}, "was trained with heads 8; heads 4 contradicts"),
    "method": (state("v2"), {"decoder_method": "rounded"}, "'rounded' is not one of default, discrete"),
    "a setting of another layout": (
        state("v1"),
        {"decoder_method": "discrete"},
        "decoder_method cannot be set for",
    ),
    "uneven points": (original_state("v2", points=(2, 4, 2)), {}, r"samples \[2, 4, 2\] points"),
    "missing": (
        changed("v1", decoder__dec_bbox_head__1__layers__0__bias=None),
        {},
        "1 missing: .*bbox_embed.1.layers.0.bias",
    ),
    "unexpected": (
        changed("v1", encoder__extra__weight=torch.zeros(1)),
        {},
        "1 unexpected: model.encoder.extra.weight",
    ),
    "another backbone": (
        {re.sub(r"^backbone\.", "backbone.base.", name): value for name, value in state("v1").items()},
        {},
        "not one that qdetr reads; it reads ResNet-vd",
    ),
}


@pytest.mark.parametrize(("content", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(tmp_path, content, settings, message):
    with pytest.raises(CheckpointError, match=message):
        load_float(written(tmp_path / "x.pth", {"model": content}), **settings)


UNKNOWN = {
    "Ultralytics": ["model.0.conv.weight"],
    "MMDetection": ["bbox_head.fc_cls.weight", "backbone.conv1.weight"],
    "detrex": ["transformer.encoder.layers.0.attentions.0.attn.in_proj_weight"],
    "Hugging Face": ["model.encoder.layers.0.self_attn_layer_norm.weight"],
    "deployed D-FINE": ["encoder.lateral_convs.0.conv_bn_fused.weight"],
    "Conditional-DETR": ["transformer.decoder.layers.0.ca_qcontent_proj.weight", "query_embed.weight"],
    "DINO": ["label_enc.weight", "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"],
    "Deformable-DETR": ["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"],
}


@pytest.mark.parametrize(("like", "names"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_layout_is_described(tmp_path, like, names):
    path = written(tmp_path / "x.pth", {"model": {name: torch.zeros(1) for name in names}, "epoch": 3})
    with pytest.raises(CheckpointError, match=like) as error:
        load_float(path)
    for part in ("its keys: epoch, model", sorted(names)[0], "lyuwenyu/RT-DETR", "facebookresearch/detr"):
        assert part in str(error.value)


@pytest.mark.parametrize("whole", [32, 49, 256, 384])  # 49 * (1 / 49) is below 1
def test_every_width_is_its_ratio_of_the_whole(whole):
    assert [int(whole * ratio(part, whole)) for part in range(1, whole + 1)] == list(range(1, whole + 1))
