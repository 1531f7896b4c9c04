"""facebookresearch/detr files: predictions against an independent DETR, structure from shapes, refusals."""

import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from original_detr import random_detr

from qdetr_cli.checkpoint import load_float
from qdetr_cli.errors import CheckpointError
from qdetr_cli.original import read_original

VARIANTS = {
    "resnet18": {},
    "resnet34, 20 classes": {"network": "resnet34", "classes": 20},
    "resnet50, other width and layers": {"network": "resnet50", "width": 48, "heads": 6, "layers": (1, 2)},
    "resnet50 DC5": {"network": "resnet50", "dilation": True},
    "resnet101": {"network": "resnet101", "layers": (1, 1)},
    "pre-norm": {"pre_norm": True},
    "learned positions": {"learned": True},
}


def arguments(options: dict) -> Namespace:
    """What the original's training files say of their structure."""
    return Namespace(
        nheads=options.get("heads", 4),
        dilation=options.get("dilation", False),
        pre_norm=options.get("pre_norm", False),
        backbone=options.get("network", "resnet18"),
    )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_predictions_are_the_originals_on_a_padded_batch(tmp_path, options):
    original = random_detr(**options)
    path = tmp_path / "checkpoint.pth"
    content = {"model": original.state_dict(), "args": arguments(options), "epoch": 3, "optimizer": {}}
    torch.save(content, path)
    images = torch.randn(2, 3, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[0, 64:] = padding[1, :, 70:] = True
    images[padding[:, None].expand_as(images)] = 0

    detector = load_float(path)
    outputs = detector.model(pixel_values=images, pixel_mask=(~padding).long())
    logits, boxes = original(images, padding)
    torch.testing.assert_close(outputs.logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, boxes, rtol=0, atol=1e-5)
    assert detector.notes == ()
    assert not torch.allclose(outputs.logits, detector.model(pixel_values=images).logits, atol=1e-3)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A release file: weights alone."""
    path = tmp_path_factory.mktemp("release") / "detr-r18.pth"
    torch.save({"model": random_detr(width=32, heads=4).state_dict()}, path)
    return path


def test_what_a_release_file_does_not_say_is_noted(release):
    detector = load_float(release)
    assert detector.model.config.encoder_attention_heads == 8
    assert detector.notes == (
        "the file does not say heads 8 and dilation False: assumed, as in the published models",
    )
    assert detector.family.name == "detr"
    assert detector.model.config.auxiliary_loss is False


def test_options_stand_in_for_what_is_not_said(release):
    detector = load_float(release, heads=4, dilation=True)
    assert detector.model.config.decoder_attention_heads == 4
    assert detector.model.config.backbone_config.output_stride == 16
    assert detector.notes == ()


def test_coco_heads_have_the_names_of_category_ids(release):
    names = load_float(release).class_names
    assert (len(names), names[0], names[1], names[18], names[90]) == (
        91,
        "N/A",
        "person",
        "dog",
        "toothbrush",
    )


def test_other_heads_have_numbered_classes(tmp_path):
    path = tmp_path / "voc.pth"
    torch.save({"model": random_detr(classes=3).state_dict()}, path)
    assert load_float(path).class_names == {0: "class 0", 1: "class 1", 2: "class 2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "5 heads do not divide the width 32"),
        ({"pre_norm": True}, "pre_norm False; pre_norm True contradicts"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(release, options, message):
    with pytest.raises(CheckpointError, match=message):
        load_float(release, **options)


def test_an_option_that_contradicts_args_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": random_detr().state_dict(), "args": arguments({})}, path)
    with pytest.raises(CheckpointError, match="was trained with heads 4; heads 8 contradicts"):
        load_float(path, heads=8)


def test_distributed_prefix_and_bare_state_dicts_are_read(tmp_path):
    model = random_detr()
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in model.state_dict().items())
    torch.save(state, tmp_path / "bare.pth")
    found = read_original(tmp_path / "bare.pth", heads=4)
    assert torch.equal(found.state["class_labels_classifier.weight"], model.class_embed.weight)


def damaged(state: dict, what: str) -> dict:
    if what == "missing":
        del state["transformer.decoder.layers.2.linear1.bias"], state["bbox_embed.layers.1.weight"]
    elif what == "unexpected":
        state["mask_head.lay1.weight"] = torch.zeros(1)
    else:
        state["bbox_embed.layers.2.bias"] = torch.zeros(5)
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "2 missing: bbox_predictor.layers.1.weight, model.decoder.layers.2.mlp.fc1.bias"),
        ("unexpected", "1 unexpected: mask_head.lay1.weight"),
        ("of another shape", r"bbox_predictor.layers.2.bias float32\(5,\) for float32\(4,\)"),
    ],
    ids=str,
)
def test_weights_are_loaded_strictly(tmp_path, what, message):
    torch.save({"model": damaged(random_detr().state_dict(), what)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_float(tmp_path / "x.pth")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


@pytest.mark.parametrize("old_format", [True, False], ids=["pickle", "zip"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch, old_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Hostile()}, "evil.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"refused, because its pickle names \w+\.mkdir"):
        load_float("evil.pth")
    assert os.listdir() == ["evil.pth"]


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_float("evil.pth")
    assert os.listdir() == ["evil.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"decoder.dec_score_head.0.bias": torch.zeros(1)}},
            "does not read; its keys: model.*dec_score",
        ),
        ({"ema": {"module": {}}}, "its keys: ema"),
        ([torch.zeros(1)], "holds a list"),
        ({"model": torch.zeros(1)}, "its keys: model; its 1 tensors begin with model"),
    ],
    ids=["another detector", "training file of another", "list", "tensor"],
)
def test_other_layouts_are_refused_by_what_was_found(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_float(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"], ids=["empty", "text", "zip"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        load_float(tmp_path / "x.pth")


def test_an_unknown_backbone_is_described(tmp_path):
    state = random_detr().state_dict()
    state["backbone.0.body.layer1.2.conv1.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"\(3, 2, 2, 2\) basic blocks; known are resnet18"):
        load_float(tmp_path / "x.pth")


def test_pre_norm_with_learned_positions_is_refused(tmp_path):
    torch.save({"model": random_detr(pre_norm=True, learned=True).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="pre-norm with learned positions"):
        load_float(tmp_path / "x.pth")
