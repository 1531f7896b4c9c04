"""RF-DETR files: tensors go where transformers itself converts them to; args, names, pixels; refusals."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from original_line import linear, mlp, norm
from safetensors.torch import save_file
from torch import Tensor

from qdetr_cli.checkpoint import load_float
from qdetr_cli.errors import CheckpointError
from qdetr_cli.original import read_original

VIT = "backbone.0.encoder.encoder."
PROJECTOR = "backbone.0.projector.stages.0."
SAID = {"sa_nheads": 4, "ca_nheads": 4, "num_windows": 2, "resolution": 128, "out_feature_indexes": [1, 2]}


def shapes(patch: int, classes: int, queries: int = 6, groups: int = 2):
    """Names and shapes of roboflow/rf-detr: a ViT of two layers, a projector, a decoder of two."""
    width, inner = 64, 32
    yield f"{VIT}embeddings.cls_token", (1, 1, width)
    yield f"{VIT}embeddings.mask_token", (1, width)
    yield f"{VIT}embeddings.position_embeddings", (1, 17, width)
    yield f"{VIT}embeddings.patch_embeddings.projection.weight", (width, 3, patch, patch)
    yield f"{VIT}embeddings.patch_embeddings.projection.bias", (width,)
    for layer in (f"{VIT}encoder.layer.{index}" for index in range(2)):
        for each in ("query", "key", "value"):
            yield from linear(f"{layer}.attention.attention.{each}", width, width)
        yield from linear(f"{layer}.attention.output.dense", width, width)
        yield from linear(f"{layer}.mlp.fc1", 4 * width, width)
        yield from linear(f"{layer}.mlp.fc2", width, 4 * width)
        for index in (1, 2):
            yield from norm(f"{layer}.norm{index}", width)
            yield f"{layer}.layer_scale{index}.lambda1", (width,)
    yield from norm(f"{VIT}layernorm", width)
    convs = [("cv1", inner, 2 * width, 1), ("cv2", inner, 5 * inner // 2, 1)]
    convs += [(f"m.{block}.cv{index}", inner // 2, inner // 2, 3) for block in range(3) for index in (1, 2)]
    for name, out, into, kernel in convs:
        yield f"{PROJECTOR}0.{name}.conv.weight", (out, into, kernel, kernel)
        yield from norm(f"{PROJECTOR}0.{name}.bn", out)
    yield from norm(f"{PROJECTOR}1", inner)
    for layer in (f"transformer.decoder.layers.{index}" for index in range(2)):
        yield f"{layer}.self_attn.in_proj_weight", (3 * inner, inner)
        yield f"{layer}.self_attn.in_proj_bias", (3 * inner,)
        for each, out, into in (
            ("self_attn.out_proj", inner, inner),
            ("cross_attn.sampling_offsets", 16, inner),
            ("cross_attn.attention_weights", 8, inner),
            ("cross_attn.value_proj", inner, inner),
            ("cross_attn.output_proj", inner, inner),
            ("linear1", 48, inner),
            ("linear2", inner, 48),
        ):
            yield from linear(f"{layer}.{each}", out, into)
        yield from (each for index in (1, 2, 3) for each in norm(f"{layer}.norm{index}", inner))
    yield from norm("transformer.decoder.norm", inner)
    yield from mlp("transformer.decoder.ref_point_head", 2 * inner, inner, inner)
    for group in range(groups):
        yield from linear(f"transformer.enc_output.{group}", inner, inner)
        yield from norm(f"transformer.enc_output_norm.{group}", inner)
        yield from mlp(f"transformer.enc_out_bbox_embed.{group}", inner, inner, inner, 4)
        yield from linear(f"transformer.enc_out_class_embed.{group}", classes, inner)
    yield from linear("class_embed", classes, inner)
    yield from mlp("bbox_embed", inner, inner, inner, 4)
    yield "refpoint_embed.weight", (queries * groups, 4)
    yield "query_feat.weight", (queries * groups, inner)


def rf_state(patch: int = 16, classes: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes(patch, classes)}


def file(path: Path, state: dict[str, Tensor] | None = None, **said: object) -> Path:
    content = {"model": rf_state() if state is None else state, "args": Namespace(**{**SAID, **said})}
    torch.save(content, path / "x.pth")
    return path / "x.pth"


def test_tensors_go_where_transformers_own_conversion_puts_them(tmp_path):
    detector = load_float(file(tmp_path))
    detector.model.config.save_pretrained(tmp_path / "folder")
    save_file(rf_state(), tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.RfDetrForObjectDetection.from_pretrained(tmp_path / "folder").state_dict()
    ours = detector.model.state_dict()
    assert set(ours) == set(theirs)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_args_say_what_shapes_do_not(tmp_path):
    detector = load_float(file(tmp_path))
    config = detector.model.config
    assert detector.notes == ()
    assert (config.num_queries, config.group_detr, config.decoder_layers) == (6, 2, 2)
    assert (config.decoder_self_attention_heads, config.decoder_cross_attention_heads) == (4, 4)
    assert (config.decoder_n_points, config.backbone_config.num_windows) == (2, 2)
    assert config.layer_norm_eps == 1e-6  # the projector's in the original; transformers' default is 1e-5
    assert (detector.processor.size, detector.processor.mean[0]) == ((128, 128), 0.485)


@pytest.mark.parametrize(
    ("patch", "windows", "stages", "resolution"), [(16, 2, [3, 6, 9, 12], 64), (14, 4, [2, 5, 8, 11], 560)]
)
def test_without_args_the_published_model_of_the_patch_size_is_meant(
    tmp_path, patch, windows, stages, resolution
):
    torch.save({"model": rf_state(patch)}, tmp_path / "x.pth")
    found = read_original(tmp_path / "x.pth", heads=4)
    assert found.config["backbone_config"]["num_windows"] == windows
    assert found.config["backbone_config"]["out_features"] == [f"stage{stage}" for stage in stages]
    assert found.processor["size"]["height"] == resolution
    assert found.notes[0].startswith(f"the file does not say windows {windows} and resolution {resolution}")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["cat", "dog", "cow", "owl"], ["cat", "dog", "cow", "owl"]),
        (["cat", "dog", "cow"], ["N/A", "cat", "dog", "cow"]),
        ({1: "cat", 3: "dog"}, ["N/A", "cat", "N/A", "dog"]),
        (None, ["class 0", "class 1", "class 2", "class 3"]),
    ],
    ids=["a row", "a row from 1", "category ids", "none"],
)
def test_class_names_are_those_of_args(tmp_path, names, wanted):
    found = read_original(file(tmp_path, class_names=names))
    assert list(found.config["id2label"].values()) == wanted


def test_the_plain_weights_are_used_as_rf_detr_does_and_it_is_said(tmp_path):
    state = rf_state()
    torch.save({"model": state, "ema_model": {k: v * 0 for k, v in state.items()}}, tmp_path / "x.pth")
    found = read_original(tmp_path / "x.pth", heads=4)
    assert torch.equal(found.state["class_embed.bias"], state["class_embed.bias"])
    assert found.notes[0] == "the file holds weights under model, ema_model: model is used"
    assert not read_original(tmp_path / "x.pth", heads=4, weights="ema_model").state["class_embed.bias"].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("segmentation_head.bias", "for segmentation"),
        ("backbone.0.projector.stages.1.1.weight", "several scales"),
        ("backbone.0.extra.weight", r"1 unexpected: backbone\.0\.extra\.weight"),
    ],
    ids=["segmentation", "scales", "unexpected"],
)
def test_variants_that_cannot_run_are_refused(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        load_float(file(tmp_path, {**rf_state(), name: torch.zeros(1)}))
