"""Hugging Face folders old and new, new class heads, and qdetr's own folders: strict, exact, offline."""

import copy
import json
import os
import pickle
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_detectors import CONFIGS, RESNET, TIMM, tiny_config

from qdetr_cli.checkpoint import Detector, load_config_model, load_float, model_config, with_classes
from qdetr_cli.configs import build_config, repair
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import FAMILIES, post_process, role_of
from qdetr_cli.manifest import Manifest, is_qdetr_folder, load_weights, read_manifest, save_checkpoint
from qdetr_cli.processors import Processor

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def build(name: str) -> Detector:
    torch.manual_seed(0)
    detector = load_config_model(tiny_config(name), None)
    with torch.no_grad():  # as after training: nothing is zero or tied by accident
        for tensor in detector.model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return detector


@torch.no_grad()
def predict(detector: Detector) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    outputs = detector.model(pixel_values=images)
    return outputs.logits, outputs.pred_boxes


def assert_same_predictions(one: Detector, other: Detector) -> None:
    for ours, theirs in zip(predict(one), predict(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def write_manifest(folder, detector: Detector, **changes) -> None:
    manifest = Manifest(
        **{
            "kind": "float",
            "family": detector.family.name,
            "recipe": {"schema": 1},
            "plan": {},
            "facts": {},
            "class_names": detector.class_names,
            "processor": detector.processor.to_config(),
            "config": model_config(detector),
            "source": "test",
            "versions": {"torch": torch.__version__},
            "metrics": None,
            **changes,
        }
    )
    save_checkpoint(folder, detector.model, manifest)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def saved(request, tmp_path_factory):
    """A detector, and what was loaded from the folder that transformers wrote for it."""
    detector = build(request.param)
    folder = tmp_path_factory.mktemp("hf")
    detector.model.save_pretrained(folder)
    return detector, load_float(folder)


# --- Hugging Face folders ---


def test_a_hugging_face_folder_loads_exactly(saved):
    detector, loaded = saved
    assert_same_predictions(loaded, detector)
    assert loaded.class_names == {0: "zebra", 1: "yak", 2: "fox"}
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    named = loaded.model.named_parameters()
    backbone = [value for name, value in named if role_of(loaded.family, name).startswith("backbone")]
    assert backbone
    assert all(parameter.requires_grad for parameter in backbone)


def test_a_missing_processor_is_the_familys_and_said(saved):
    detector, loaded = saved
    config, family = detector.model.config, detector.family
    expected = replace(family.processor, divisor=family.divisible(config))
    if side := family.square(config):
        expected = replace(expected, size=(side, side))
    assert loaded.processor == expected
    assert loaded.notes == (
        f"no preprocessor_config.json: images are prepared as {detector.family.name} does by default",
    )


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_processor_is_read(tmp_path, file):
    build("d_fine").model.save_pretrained(tmp_path)
    content = {"size": {"height": 96, "width": 128}}
    whole = content if file.startswith("pre") else {"image_processor": content}
    (tmp_path / file).write_text(json.dumps(whole))
    loaded = load_float(tmp_path)
    assert loaded.processor == Processor(size=(96, 128), divisor=32)
    assert loaded.notes == ()


@pytest.fixture
def folder(tmp_path):
    """A small DETR, as transformers wrote it."""
    build("detr").model.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def drop(tensors, name):
    return {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: drop(t, "bbox_predictor.layers.1"), "2 missing: bbox_predictor.layers.1.bias"),
        (lambda t: {**t, "extra.weight": torch.zeros(2)}, "1 unexpected: extra.weight"),
        (
            lambda t: {**t, "class_labels_classifier.bias": torch.zeros(9)},
            r"1 mismatched: class_labels_classifier.bias \(9,\) for \(4,\)",
        ),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_weights_are_loaded_strictly(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_float(folder)


def test_counters_of_live_batch_norms_are_harmless(folder):
    name = "model.backbone.conv_encoder.model.embedder.embedder.normalization.num_batches_tracked"
    change_weights(folder, lambda tensors: {**tensors, name: torch.tensor(7)})
    load_float(folder)


def test_half_precision_weights_become_float32(folder):
    change_weights(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert {tensor.dtype for tensor in load_float(folder).model.parameters()} == {torch.float32}


def test_a_damaged_safetensors_header_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_float(folder)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


def test_a_hostile_pickle_in_a_folder_is_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"class_labels_classifier.bias": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_float(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_float(folder)
    assert not (folder / "hostile-was-here").exists()


def test_options_of_pth_files_have_no_effect_on_a_folder(folder):
    with pytest.raises(CheckpointError, match=r"heads, dilation can only be set for an original \.pth"):
        load_float(folder, heads=4, dilation=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "bert"}', "'bert' is not a detector"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"model_type": "detr", "num_queries": "many"}', "transformers refuses it for detr"),
        (
            '{"model_type": "detr", "backbone_config": {"model_type": "vgg"}}',
            "no backbone_config.model_type 'vgg'",
        ),
        (
            '{"model_type": "detr", "backbone": "some/backbone", "use_timm_backbone": false}',
            "'some/backbone' is a hub id and its structure is not in the file",
        ),
    ],
    ids=["other model", "cut off", "list", "wrong type", "unknown backbone", "backbone on the hub"],
)
def test_a_config_that_cannot_be_used_is_explained(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_float(folder)


def test_a_folder_without_config_or_weights_is_explained(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither qdetr\.json \(qdetr\) nor config\.json"):
        load_float(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_float(folder)


@pytest.mark.parametrize(
    "source", ["no/such/folder", "./nothing", "missing.pth", "C:\\x", "runs/mistyped"], ids=str
)
def test_nothing_there_is_explained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        load_float(source)


def test_a_hub_id_without_network_says_what_to_do():
    with pytest.raises(CheckpointError, match=r"facebook/detr-resnet-50: is no folder here.*name the folder"):
        load_float("facebook/detr-resnet-50")


# --- configs of the transformers-4 era ---


def era_4(**changes) -> dict:
    config = {key: value for key, value in tiny_config("detr").items() if key != "backbone_config"}
    return {**config, "backbone_config": None, "use_pretrained_backbone": True, **changes}


@pytest.mark.parametrize(
    "old",
    [
        era_4(backbone="test_resnet", use_timm_backbone=True, backbone_kwargs=None),
        era_4(backbone="test_resnet", use_timm_backbone=True, backbone_kwargs={"out_indices": [1, 2, 3, 4]}),
        era_4(backbone="test_resnet", use_timm_backbone=False, backbone_kwargs={}),
        era_4(backbone="test_resnet"),
    ],
    ids=["kwargs null", "kwargs", "not timm", "name alone"],
)
def test_an_old_config_with_a_named_backbone_loads_without_network(tmp_path, old):
    detector = build("detr, timm")
    detector.model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same_predictions(load_float(tmp_path), detector)


TIMM_INDICES = {"deformable_detr": [2, 3, 4], "rt_detr": [2, 3, 4]}
NAMED = ("detr", "conditional_detr", "deformable_detr", "table-transformer", "dab-detr", "rt_detr")
OLD_KEYS = {
    "kwargs null": {"backbone_kwargs": None, "use_timm_backbone": True, "use_pretrained_backbone": True},
    "kwargs empty": {"backbone_kwargs": {}, "use_timm_backbone": True, "use_pretrained_backbone": False},
    "kwargs of timm": {"backbone_kwargs": {"in_chans": 3}, "use_timm_backbone": True},
    "name alone": {},
}


@pytest.mark.parametrize("keys", OLD_KEYS.values(), ids=OLD_KEYS)
@pytest.mark.parametrize("name", NAMED, ids=str)
def test_old_configs_of_each_family_load_without_network(tmp_path, name, keys):
    """As transformers 4 wrote them: the backbone is a name, its structure nowhere in the file."""
    indices = TIMM_INDICES.get(name, [1, 2, 3, 4])
    config = tiny_config(name) | {"backbone_config": {**TIMM, "out_indices": indices}}
    if name == "rt_detr":
        config["encoder_in_channels"] = [48, 192, 96]
    detector = load_config_model(config, None)
    detector.model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    kwargs = keys.get("backbone_kwargs")
    if kwargs:
        keys = keys | {"backbone_kwargs": {**kwargs, "out_indices": indices}}
    old = {key: value for key, value in written.items() if key != "backbone_config"}
    old |= {"backbone": "test_resnet", "torch_dtype": "float32", "transformers_version": "4.36.0", **keys}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same_predictions(load_float(tmp_path), detector)


def test_an_old_yolos_config_loads_without_network(tmp_path):
    detector = build("yolos")
    detector.model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    old = {"torch_dtype": "float32", "transformers_version": "4.20.0", "use_timm_backbone": None}
    (tmp_path / "config.json").write_text(json.dumps(written | old))
    assert_same_predictions(load_float(tmp_path), detector)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({}, "timm_backbone"),
        ({"backbone_config": None, "backbone": None, "use_timm_backbone": True}, "timm_backbone"),
        ({"backbone_config": None, "backbone": None, "use_timm_backbone": False}, "resnet"),
        ({"backbone_config": {}, "backbone": "resnet50", "backbone_kwargs": None}, "timm_backbone"),
        ({"backbone": "microsoft/resnet-50", "use_timm_backbone": False, "backbone_kwargs": {}}, "resnet"),
    ],
    ids=["no keys", "timm's default", "own default", "empty", "hub name"],
)
@pytest.mark.parametrize("name", NAMED[:5], ids=str)
def test_keys_that_are_missing_mean_what_transformers_means(name, keys, kind):
    config = build_config({"model_type": name, **keys})
    backbone = config.backbone_config
    assert backbone.model_type == kind
    if kind == "timm_backbone":
        assert backbone.backbone == "resnet50"
    else:
        assert list(backbone.depths) == [3, 4, 6, 3]


def test_a_shared_tensor_is_found_under_any_of_its_names(tmp_path):
    """`save_pretrained` may keep another name of a tied tensor than `from_pretrained` looks for."""
    detector = build("deimv2-lite")
    detector.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert_same_predictions(load_float(tmp_path), detector)
    swapped = {key.replace("bbox_embed.1.", "bbox_embed.0."): value for key, value in stored.items()}
    save_file(swapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_predictions(load_float(tmp_path), detector)


def test_an_old_config_with_an_explicit_backbone_loads_without_network(tmp_path):
    detector = build("detr")
    detector.model.save_pretrained(tmp_path)
    old = era_4(backbone=None, use_timm_backbone=False, backbone_kwargs=None, backbone_config=RESNET)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same_predictions(load_float(tmp_path), detector)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            {"model_type": "detr", "backbone": "resnet50", "dilation": True, "backbone_kwargs": None},
            {"backbone": "resnet50", "out_indices": [1, 2, 3, 4], "output_stride": 16},
        ),
        (
            {"model_type": "deformable_detr", "backbone": "resnet50", "num_feature_levels": 1},
            {"backbone": "resnet50", "out_indices": [4]},
        ),
        (
            {"model_type": "rt_detr", "backbone": "resnet50d", "backbone_kwargs": {"out_indices": [1, 2, 3]}},
            {"backbone": "resnet50d", "out_indices": [1, 2, 3]},
        ),
        (
            {"model_type": "conditional_detr", "backbone": "microsoft/resnet-18", "use_timm_backbone": False},
            {"model_type": "resnet", "depths": [2, 2, 2, 2], "out_features": ["stage4"]},
        ),
        (
            {"model_type": "detr", "backbone_config": {**TIMM, "use_pretrained_backbone": True}},
            {"backbone": "test_resnet", "use_pretrained_backbone": False},
        ),
    ],
    ids=["dilation", "one level", "kwargs", "hub name of a ResNet", "pretrained"],
)
def test_repaired_backbones(config, wanted):
    before = copy.deepcopy(config)
    repaired = repair(config)
    assert wanted.items() <= repaired["backbone_config"].items()
    assert not {"backbone", "backbone_kwargs", "use_timm_backbone"} & set(repaired)
    assert config == before


@pytest.mark.parametrize("flag", [True, False])
def test_auxiliary_loss_stays_as_the_checkpoint_has_it(tmp_path, flag):
    torch.manual_seed(0)
    detector = load_config_model({**tiny_config("detr"), "auxiliary_loss": flag}, None)
    detector.model.save_pretrained(tmp_path)
    assert load_float(tmp_path).model.config.auxiliary_loss is flag
    assert with_classes(detector, NAMES).model.config.auxiliary_loss is flag


# --- other classes ---


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_a_new_class_head_changes_nothing_else(name):
    detector = build(name)
    before = torch.random.get_rng_state()
    fitted = with_classes(detector, NAMES)
    assert torch.equal(before, torch.random.get_rng_state())

    assert fitted.class_names == dict(enumerate(NAMES))
    assert fitted.model.config.num_labels == 5
    assert predict(fitted)[0].shape[-1] == (6 if detector.family.softmax else 5)
    assert "new class head: 5 classes in place of 3" in fitted.notes[-1]
    old, new = detector.model.state_dict(), fitted.model.state_dict()
    changed = {key for key in new if old[key].shape != new[key].shape}
    assert {role_of(fitted.family, key.rpartition(".")[0]) for key in changed} <= {"class_head", "query"}
    assert all(torch.equal(new[key], old[key]) for key in new if key not in changed)
    assert detector.class_names[0] == "zebra"
    assert detector.model.config.num_labels == 3


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_a_new_class_head_is_new_even_for_as_many_classes_and_the_backbone_can_learn(name):
    detector = build(name)
    with torch.no_grad():
        for parameter in detector.model.parameters():
            parameter.add_(0.1)  # trained: not what a seed gives
    fitted = with_classes(detector, ("ant", "bee", "cat"))
    old, new = detector.model.state_dict(), fitted.model.state_dict()
    heads = [
        key
        for key in new
        if key.endswith("weight")
        and role_of(fitted.family, key.rpartition(".")[0]) == "class_head"
        and new[key].shape[0] in (3, 4)
    ]
    assert heads
    assert not any(torch.equal(old[key], new[key]) for key in heads)
    backbone = [
        p for n, p in fitted.model.named_parameters() if role_of(fitted.family, n).startswith("backbone")
    ]
    assert backbone
    assert all(parameter.requires_grad for parameter in backbone)


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("conditional_detr", 0.01),
        ("deformable_detr", 0.01),
        ("dab-detr", 0.01),
        ("d_fine", 1 / 6),
        ("rt_detr", 1 / 6),
    ],
    ids=str,
)
def test_a_new_sigmoid_head_starts_at_its_prior(name, prior):
    model = with_classes(build(name), NAMES).model
    heads = [key for key, value in model.state_dict().items() if key.endswith("bias") and value.shape == (5,)]
    assert heads
    for key in heads:
        assert role_of(FAMILIES[name], key.removesuffix(".bias")) == "class_head"
        torch.testing.assert_close(model.state_dict()[key].sigmoid(), torch.full((5,), prior))


@pytest.mark.parametrize("name", ["d_fine", "rt_detr"])
def test_the_denoising_embedding_has_a_row_for_each_class_and_one_for_none(name):
    embedding = with_classes(build(name), NAMES).model.model.denoising_class_embed
    assert embedding.weight.shape == (6, 16)
    assert embedding.padding_idx == 5


def test_the_same_classes_need_no_new_head():
    detector = build("detr")
    assert with_classes(detector, ["zebra", "yak", "fox"]) is detector


def test_new_heads_are_the_same_every_time():
    detector = build("d_fine")
    one, two = (with_classes(detector, NAMES).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- qdetr's own folders ---


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_a_qdetr_folder_is_exact(tmp_path, name):
    detector = build(name)
    write_manifest(tmp_path / "run", detector)
    assert is_qdetr_folder(tmp_path / "run")
    loaded = load_float(tmp_path / "run")
    assert_same_predictions(loaded, detector)
    assert (loaded.class_names, loaded.processor) == (detector.class_names, detector.processor)
    own, other = detector.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)
    sizes = torch.tensor([[64, 96], [64, 96]])
    images = torch.rand(2, 3, 64, 96)
    found = post_process(loaded.family, loaded.model(pixel_values=images), sizes)
    assert len(found) == 2
    assert found[0].boxes.shape[1:] == (4,)


def test_tensors_stand_in_the_file_once_under_in_memory_names(tmp_path):
    detector = build("d_fine")
    write_manifest(tmp_path, detector)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        aliases = json.loads(file.metadata()["aliases"])
    assert names | set(aliases) == set(detector.model.state_dict())
    assert names.isdisjoint(aliases)
    assert aliases["class_embed.0.weight"] == "model.decoder.class_embed.0.weight"


def test_a_manifest_comes_back_as_it_was(tmp_path):
    detector = build("detr")
    write_manifest(tmp_path, detector, kind="fake-quant", metrics={"ap": 0.5}, plan={"modules": []})
    manifest = read_manifest(tmp_path)
    assert (manifest.kind, manifest.metrics, manifest.plan) == ("fake-quant", {"ap": 0.5}, {"modules": []})
    assert manifest.class_names == {0: "zebra", 1: "yak", 2: "fox"}
    assert manifest == Manifest.from_dict(manifest.to_dict())


def test_a_fake_quant_folder_is_no_float_model(tmp_path):
    write_manifest(tmp_path, build("detr"), kind="fake-quant")
    with pytest.raises(CheckpointError, match="is a fake-quant checkpoint; a float model is wanted"):
        load_float(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 9}, "format 9; this qdetr reads format 1"),
        (lambda m: m | {"surprise": 1}, r"unknown keys \['surprise'\]"),
        (lambda m: {k: v for k, v in m.items() if k != "config"}, r"missing keys \['config'\]"),
        (lambda m: m | {"kind": "int"}, "kind 'int' is not float, fake-quant or packed"),
        (lambda m: m | {"class_names": ["a"]}, "not a manifest"),
        (lambda m: [m], "not a manifest"),
    ],
    ids=["format", "unknown", "missing", "kind", "names", "list"],
)
def test_a_damaged_manifest_is_explained(tmp_path, change, message):
    write_manifest(tmp_path, build("detr"))
    path = tmp_path / "qdetr.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_differing_weights_are_listed_and_nothing_is_loaded(tmp_path):
    detector = build("conditional_detr")
    write_manifest(tmp_path, detector)
    extra = {"strange": torch.zeros(1), "class_labels_classifier.bias": torch.zeros(3, dtype=torch.float64)}
    change_weights(tmp_path, lambda tensors: drop(tensors, "ref_point_head.layers.1") | extra)
    other = load_config_model(tiny_config("conditional_detr"), None)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, other.model)
    for part in (
        "2 missing: model.decoder.ref_point_head.layers.1.bias, model.decoder.ref_point_head.layers.1.weight",
        "1 unexpected: strange",
        "class_labels_classifier.bias float64(3,) for float32(3,)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in other.model.state_dict().items())


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100], ids=["empty", "header"])
def test_damaged_weights_are_named(tmp_path, damage):
    detector = build("detr")
    write_manifest(tmp_path, detector)
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_weights(tmp_path, detector.model)


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    detector = build("detr")
    write_manifest(tmp_path / "run", detector)
    before = sorted(path.read_bytes() for path in (tmp_path / "run").iterdir())

    def disk_full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdetr_cli.manifest.save_file", disk_full)
    with pytest.raises(Exception, match="No space left"):
        write_manifest(tmp_path / "run", detector, source="second")
    assert sorted(path.read_bytes() for path in (tmp_path / "run").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_can_be_moved(tmp_path):
    detector = build("detr")
    write_manifest(tmp_path / "one", detector)
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert_same_predictions(load_float(tmp_path / "two"), detector)
