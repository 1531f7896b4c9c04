"""A family from outside: the sample of `plugins/` goes through every command, and only when it is named."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_detectors import CLASSES, RESNET
from tiny_runs import PADDED, SETS, as_json, ok, refused, write_coco

from qdetr_cli import plugins
from qdetr_cli.checkpoint import load_config_model, load_float
from qdetr_cli.errors import CheckpointError
from qdetr_cli.models import Source, open_model, save_model
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import quantizers, set_enabled

SAMPLES = Path(__file__).parents[1] / "plugins"
NAMED = ("--plugins", SAMPLES)
RECIPE = ("--recipe", "w4a4_attn4")
CONFIG = {
    "model_type": "anchor_detr",
    "backbone_config": RESNET,
    "width": 16,
    "heads": 2,
    "ffn": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 7,
    **CLASSES,
}
ATTENTIONS = {f"{side}.own" for side in ("encoder.0", "decoder.0", "decoder.1")}
ATTENTIONS |= {"decoder.0.cross", "decoder.1.cross"}


@pytest.fixture(scope="module", autouse=True)
def _table():
    """Begin with the built-ins and leave nothing behind."""
    table, loaded, modules = dict(plugins._TABLE), set(plugins._LOADED), set(sys.modules)
    forget()
    yield
    plugins._TABLE.clear()
    plugins._TABLE.update(table)
    plugins._LOADED.clear()
    plugins._LOADED.update(loaded)
    for name in set(sys.modules) - modules:
        if name.startswith("qdetr_plugin_"):
            del sys.modules[name]


def forget() -> None:
    """As in a new process: only what qdetr brings is registered."""
    for key in [key for key, each in plugins._TABLE.items() if each.origin != "built-in"]:
        del plugins._TABLE[key]
    plugins._LOADED.clear()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`model/` as save_pretrained wrote it, `data/`, and `ptq/` that was calibrated."""
    root = tmp_path_factory.mktemp("world")
    plugins.load([SAMPLES])
    torch.manual_seed(0)
    detector = load_config_model(CONFIG, PADDED)
    detector.model.save_pretrained(root / "model")
    (root / "model" / "preprocessor_config.json").write_text(json.dumps(detector.processor.to_config()))
    write_coco(root / "data", ((80, 60), (61, 90)))
    forget()
    data = ("--data", root / "data")
    ok("quantize", root / "model", *RECIPE, *data, "--out", root / "ptq", *SETS[:2], *NAMED)
    forget()
    return root


def test_a_recipe_plans_all_of_it(world):
    found = as_json("inspect", world / "model", *RECIPE, *NAMED)
    assert (found["family"], found["notes"]) == ("anchor_detr", [])
    formats = {
        module["path"]: {slot["slot"]: slot["format"] for slot in module["slots"]}
        for module in found["plan"]["modules"]
    }
    bits = {path: {each and each["bits"] for each in slots.values()} for path, slots in formats.items()}
    assert {path for path in formats if set(formats[path]) == {"q", "k", "probs", "v"}} == ATTENTIONS
    assert all(bits[path] == {4} for path in ATTENTIONS)
    layers = {path for path, slots in formats.items() if "output" not in slots}  # residual sums stay float
    assert {path for path in layers if None in bits[path]} == {"place.0", "place.2", "locate.2"}


def test_it_is_fine_tuned_resumed_and_evaluated(world, tmp_path):
    data = ("--data", world / "data")
    finetune = ("finetune", world / "model", *RECIPE, *data, "--out", tmp_path / "run", *SETS, *NAMED)
    assert as_json(*finetune)["steps"] == 2
    ok(*finetune, "--resume")
    found = as_json("eval", tmp_path / "run", *data, "--ladder", "--workers", "0", *NAMED)
    assert [rung["rung"] for rung in found["ladder"]][:2] == ["float", "+ backbone"]


def test_predict_draws_its_boxes(world, tmp_path):
    image, out = world / "data" / "val" / "val1.png", tmp_path / "boxes"
    found = as_json("predict", world / "ptq", image, "--threshold", "0", "--out", out, *NAMED)
    assert len(found["images"][0]["objects"]) == 7 * 2  # queries, classes of the data
    assert (out / "val1.png").is_file()


@torch.no_grad()
def test_with_quantizers_off_it_is_the_float_model(world):
    plugins.load([SAMPLES])
    pixels = torch.randn(3, 3, 64, 90, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 64, 90, dtype=torch.int64)
    mask[0, :, 40:] = 0
    wanted = load_float(world / "model").model(pixel_values=pixels, pixel_mask=mask)
    model = open_model(Source(str(world / "ptq")), print).module
    assert not torch.allclose(model(pixel_values=pixels, pixel_mask=mask).pred_boxes, wanted.pred_boxes)
    set_enabled(model, None, False)
    assert {path.rpartition(".")[0] for path in quantizers(model) if "probs" in path} == ATTENTIONS
    found = model(pixel_values=pixels, pixel_mask=mask)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, rtol=1e-4, atol=1e-5)


def test_a_float_checkpoint_of_it_imports_nothing_either(world, tmp_path):
    plugins.load([SAMPLES])
    model = open_model(Source(str(world / "model")), print)
    save_model(model.module, model, tmp_path / "float", load_recipe("float"), None)
    assert as_json("inspect", tmp_path / "float", *NAMED)["family"] == "anchor_detr"
    forget()
    message = refused("inspect", tmp_path / "float")
    assert "float: needs the family anchor_detr of a plugin" in message
    assert message.endswith("name where it lies: --plugins FOLDER")


@torch.no_grad()
def test_its_training_file_is_read_by_its_own_layout(world, tmp_path):
    plugins.load([SAMPLES])
    wanted, pixels = load_float(world / "model").model, torch.ones(1, 3, 64, 64)
    content = {"model": wanted.state_dict(), "args": Namespace(config=wanted.config.to_dict())}
    torch.save(content, tmp_path / "trained.pth")
    found = load_float(tmp_path / "trained.pth").model(pixel_values=pixels)
    assert torch.equal(found.logits, wanted(pixel_values=pixels).logits)
    torch.save({"model": wanted.state_dict()}, tmp_path / "silent.pth")
    with pytest.raises(CheckpointError, match=r"silent\.pth: does not say its config"):
        load_float(tmp_path / "silent.pth")
    forget()
    with pytest.raises(CheckpointError, match="is of a layout that qdetr does not read"):
        load_float(tmp_path / "trained.pth")


@pytest.mark.parametrize("command", ["inspect", "predict"])
def test_nothing_is_imported_until_its_folder_is_named(world, tmp_path, command):
    forget()
    rest = () if command == "inspect" else (world / "data" / "val", "--out", tmp_path / "p")
    message = refused(command, world / "model", *rest)
    assert "model_type 'anchor_detr' is not a detector that qdetr knows" in message
    assert "name its folder with --plugins" in message
    message = refused(command, world / "ptq", *rest)
    assert "needs the family anchor_detr of a plugin; a checkpoint imports nothing by itself" in message
    assert message.endswith(f"name where it lies: --plugins {SAMPLES.resolve()}")
    assert "anchor_detr" not in plugins.names("family")
