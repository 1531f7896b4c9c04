"""Every command from words to files: what it prints, its exit code, and what a mistake leaves behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console
from tiny_runs import DIGITS, SETS, as_json, ok, qdetr, refused, write_coco, write_model

from qdetr_cli import demo, report
from qdetr_cli.runs import Journal
from qdetr_cli.scene_files import write_scenes

PROMISED = {"ap", "ap50", "ap75", "ap50_voc_area", "ap50_voc07", "per_class"}
RUNG = {"rung", "ap", "ap50_voc_area", "delta"}
SAMPLES = Path(__file__).parent.parent / "plugins"


class World:
    """A tiny DETR, digit scenes, and what `quantize` and `finetune` make of them."""

    def __init__(self, root: Path):
        self.root = root
        self.model = write_model(root / "model")
        write_scenes(root / "scenes", train=6, val=3, size=64)
        self.voc, self.coco = root / "scenes" / "voc", root / "scenes" / "coco"
        self.quantized, self.tuned = root / "quantized", root / "tuned"
        common = ("--data", self.voc, *SETS)
        self.quantize = as_json("quantize", self.model, "-r", "w4a4", *common, "-o", self.quantized)
        self.finetune = as_json(
            "finetune", self.model, "-r", "w4a4", *common, "-o", self.tuned, "--tensorboard"
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# --- inspect ---


def test_inspect_shows_roles_classes_and_the_plan(world):
    text = ok("inspect", world.model, "--recipe", "w4a4", "--size", "64x96").stdout
    for part in (
        "detr at 64x96",
        "encoder.attention",
        "10 classes: 0, 1",
        "weight=4 input=4",
        "BitOps",
        "rules.0",
    ):
        assert part in text
    assert "detr has no sampling: skipped" in text


def test_inspect_gives_json_without_and_with_a_recipe(world):
    found = as_json("inspect", world.model, "--size", "64x64")
    assert (found["family"], found["size"], "plan" in found) == ("detr", [64, 64], False)
    assert {layer["op"] for layer in found["layers"]} == {"linear", "conv"}
    planned = as_json(
        "inspect", world.model, "-r", "w4a4", "--set", "formats.weights.bits=2", "--size", "64x64"
    )
    bits = {
        slot["format"]["bits"] for m in planned["plan"]["modules"] for slot in m["slots"] if slot["format"]
    }
    assert bits == {2, 4, 8}


def test_inspect_shows_the_plan_of_a_fake_quant_checkpoint(world):
    found = as_json("inspect", world.quantized)
    assert found["plan"]["modules"]
    assert found["size"] == [64, 64]
    assert "planned at 64x64" in refused("inspect", world.quantized, "--size", "96x96")
    assert "fake-quant checkpoint" in refused("inspect", world.quantized, "--recipe", "w4a4")


# --- quantize, finetune ---


def test_quantize_tells_before_and_after(world):
    assert {"folder", "totals", "float", "calibrated"} == set(world.quantize)
    assert set(world.quantize["float"]) >= PROMISED
    assert {path.name for path in world.quantized.iterdir()} == {"qdetr.json", "model.safetensors"}


def test_quantize_without_measuring_for_people(world, tmp_path):
    text = ok(
        "quantize",
        world.model,
        "-r",
        "w8a8",
        "-d",
        world.coco,
        *SETS[:2],
        "-o",
        tmp_path / "q",
        "--no-measure",
    ).stdout
    assert "COCO, split train, 6 images, 10 classes" in text
    assert "q: written" in text
    assert "split val" not in text


def test_quantize_on_a_coco_json_with_its_images(world, tmp_path):
    file = world.coco / "annotations" / "instances_train.json"
    moved = shutil.copy(file, tmp_path / "mine.json")
    data = ("--data", moved, "--images", world.coco / "train")
    text = ok("quantize", world.model, "-r", "w8a8", *data, *SETS[:2], "-o", tmp_path / "q").stdout
    assert "mine.json: COCO, split mine, 6 images" in text
    assert "warning: 6 of 6 images to measure on are in the training split too" in text


def test_finetune_writes_last_best_and_journal(world):
    assert world.finetune.keys() == {"folder", "best_ap", "best_step", "steps", "seconds", "last"}
    assert world.finetune["steps"] == 2
    assert set(world.finetune["last"]) >= PROMISED
    names = {path.name for path in world.tuned.iterdir()}
    assert names == {"run.json", "metrics.jsonl", "last", "best", "tensorboard"}
    assert any((world.tuned / "tensorboard").iterdir())
    assert json.loads((world.tuned / "run.json").read_text())["recipe"]["train"]["steps"] == 2


def test_finetune_in_float_from_scratch_for_people(world, tmp_path):
    sets = [*SETS, "--set", "train.batch_norm=train", "--set", "train.augment.scales=[64, 96]"]
    out = tmp_path / "f"
    text = ok("finetune", world.model, "-r", "float", "--data", world.voc, *sets, "-o", out).stdout
    assert "step 2/2: AP" in text
    assert "best/ and last/ written" in text
    assert as_json("inspect", out, "--size", "64x64")["family"] == "detr"


def test_an_interrupted_finetune_ends_with_130_and_resumes(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = (
        "finetune",
        world.model,
        "-r",
        "float",
        "--data",
        world.voc,
        *SETS,
        "--set",
        "train.steps=4",
        "-o",
        out,
    )
    stepped = report.Page.stepped

    def interrupt(page, step, total, entry):
        stepped(page, step, total, entry)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(report.Page, "stepped", interrupt)
        stopped = qdetr(*words)
    assert stopped.exit_code == 130
    assert "interrupted: stopped by SIGINT; go on with --resume" in stopped.stderr
    assert "already holds something" in refused(*words)
    assert "other settings than the run began with: recipe.train.lr" in refused(
        *words, "--set", "train.lr=1", "--resume"
    )
    assert as_json(*words, "--resume")["steps"] == 4
    assert Journal(out / "metrics.jsonl").entries()[-1]["step"] == 4


@pytest.mark.parametrize(("width", "terms"), [(80, "loss 12.345"), (160, "loss_giou 12.345")])
def test_the_bar_of_a_training_tells_what_it_counts_before_its_terms(width, terms):
    page = report.Page()
    page.console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with page.training():
        page.stepped(1300, 4000, dict.fromkeys(("loss", "loss_vfl", "loss_bbox", "loss_giou"), 12.345))
    line = [each for each in page.console.file.getvalue().splitlines() if "1300/4000" in each][-1]
    assert "fine-tune" in line
    assert terms in line


# --- eval, predict ---


def test_eval_json_has_the_promised_keys_and_the_ladder(world, tmp_path):
    out = tmp_path / "eval"
    words = ("eval", world.quantized, "--data", world.voc, "--workers", 0)
    body = as_json(*words, "--ladder", "--out", out)
    assert set(body) >= PROMISED | {"ladder", "images", "split"}
    assert (body["images"], body["split"]) == (3, "val")
    assert set(body["per_class"]) == set(DIGITS)
    assert all(set(rung) >= RUNG for rung in body["ladder"])
    assert body["ladder"][0]["rung"] == "float"
    assert body["ladder"][0]["delta"] == 0
    assert json.loads((out / "metrics.json").read_text()) == body
    with Image.open(out / "ladder.png") as picture:
        assert picture.width > 100
    plain = as_json(*words)
    assert "ladder" not in plain
    assert plain["ap"] == body["ap"]


def test_eval_shows_tables(world):
    words = ("--data", world.coco, "--workers", 0, "--ladder", "--plugins", SAMPLES, "--metric", "confidence")
    text = ok("eval", world.tuned, *words).stdout
    for part in ("reading best/", "AP50(voc-area)", "per class", "all but encoder", "delta", "confidence: "):
        assert part in text


def test_eval_refuses_before_it_reads_an_image(world, tmp_path):
    words = ("eval", world.model, "--data", world.voc)
    assert "float model, so --ladder has nothing to switch" in refused(*words, "--ladder")
    assert "metric 'nope' is unknown" in refused(*words, "--metric", "nope")
    (tmp_path / "file").write_text("x")
    assert "already holds something" in refused(*words, "--out", tmp_path / "file")
    assert "Splits found" in refused(*words, "--split", "test") or "val" in refused(*words, "--split", "test")
    other = write_coco(tmp_path / "coco")
    assert "no class for cat, dog; it knows 0, 1" in refused("eval", world.model, "--data", other)


def test_predict_draws_and_writes_json(world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (50, 40), "red").save(images / "one.png")
    Image.new("L", (40, 70)).save(images / "one.jpg")
    out = tmp_path / "out"
    body = as_json("predict", world.quantized, images, images / "one.png", "-o", out, "--threshold", 0)
    assert [Path(each["image"]).name for each in body["images"]] == ["one.jpg", "one.png"]
    assert {path.name for path in out.iterdir()} == {"one.png", "one-2.png", "predictions.json"}
    assert json.loads((out / "predictions.json").read_text()) == body["images"]
    found = body["images"][0]["objects"]
    assert found
    assert all(len(each["box"]) == 4 and each["class"] in DIGITS for each in found)
    assert "already holds something" in refused("predict", world.model, images, "-o", out)
    text = ok("predict", world.model, images, "-o", tmp_path / "again", "--threshold", 1).stdout
    assert "one.png: 0 objects" in text


# --- recipe, plugins ---


def test_recipe_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "w4a4_attn4" in ok("recipe", "list").stdout
    assert as_json("recipe", "list")["recipes"]["w4a4"].startswith("4-bit")
    assert ok("recipe", "show", "w4a4").stdout.startswith("# 4-bit")
    assert "mine.yaml: written" in ok("recipe", "new", "mine.yaml", "--from", "w3a3").stdout
    assert yaml.safe_load(Path("mine.yaml").read_text())["extends"] == "w3a3"
    assert "exists already" in refused("recipe", "new", "mine.yaml")
    assert as_json("recipe", "check", "mine.yaml")["formats"]["weights"]["bits"] == 3
    assert "no faults" in ok("recipe", "check", "mine.yaml", "--set", "train.lr=1").stdout
    assert "did you mean w4a4" in refused("recipe", "show", "w4a").lower()


def test_every_fault_of_a_recipe_is_told_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("schema: 1\nrules:\n  - {role: encoder, weight: {bits: 9}}\ntrain: {epoch: 3}\n")
    result = qdetr("recipe", "check", path)
    assert result.exit_code == 2
    assert "bad.yaml:3: rules.0.weight.bits" in result.stderr
    assert "bad.yaml:4: train.epoch" in result.stderr


def test_plugins_are_listed_with_their_files():
    rows = as_json("plugins", "--plugins", SAMPLES)["plugins"]
    by_name = {(row["kind"], row["name"]): row["origin"] for row in rows}
    assert by_name["quantizer", "lsq"] == "built-in"
    assert by_name["metric", "confidence"].endswith("confidence.py")
    assert "entropy" in ok("plugins", "--plugins", SAMPLES).stdout
    assert "no such plugin folder" in refused("plugins", "--plugins", "nowhere")
    assert "no such plugin folder" in refused("recipe", "check", "w4a4", "--plugins", "nowhere")


def test_the_process_itself_ends_with_2_and_one_line():
    words = [sys.executable, "-m", "qdetr_cli", "recipe", "check", "w4a5"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: w4a5: no such recipe")
    assert len(done.stderr.splitlines()) == 1


# --- demo ---


def test_demo_leaves_results_and_pictures(world, tmp_path, monkeypatch):
    models = tmp_path / "models"
    shutil.copytree(world.model, models / "d_fine")
    monkeypatch.setattr(demo, "MODELS", models)
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 4)
    monkeypatch.setattr(demo, "VAL_IMAGES", 2)
    monkeypatch.setattr(demo, "SETTINGS", tuple(SETS[1::2]))
    out = tmp_path / "demo"
    assert "choose one of d_fine" in refused("demo", "--out", out, "--model", "yolo")
    body = as_json("demo", "--out", out)
    assert set(body) >= {"float", "ptq", "qat", "ladder", "seconds", "versions"}
    assert all(set(body[row]) >= PROMISED for row in ("float", "ptq", "qat"))
    assert json.loads((out / "results.json").read_text()) == body
    for name in ("ladder.png", "comparison.png", "images", "ptq", "qat", "scenes"):
        assert (out / name).exists(), name
    assert len(list((out / "images").glob("*.png"))) == 2
    assert "already holds something" in refused("demo", "--out", out)


# --- mistakes: one message, code 2, nothing left behind that blocks the next try ---


@pytest.mark.parametrize("command", ["quantize", "finetune"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "nowhere: there is no such folder or file"),
        ({"model": "nowhere/model"}, "nowhere/model: "),
        ({"recipe": "w4a5"}, "w4a5: no such recipe; did you mean"),
        ({"extra": ["--set", "train.epoch=3"]}, "train.epoch"),
        ({"extra": ["--set", "train.epochs"]}, "is not key=value"),
        ({"extra": ["--device", "cuda:99"]}, "--device cuda:99: is not available here"),
        ({"extra": ["--device", "meta"]}, "--device meta: is not available here"),
        ({"extra": ["--plugins", "nowhere"]}, "nowhere: no such plugin folder"),
        ({"extra": ["--split", "test"]}, "test"),
        ({"extra": ["--images", "nowhere"]}, "nowhere: there is no such image folder"),
        ({"extra": ["--heads", "4"]}, "heads can only be set for an original .pth"),
        ({"extra": ["--set", "rules.0.path=nope.*"]}, "nope.*"),
        ({"extra": ["--set", "rules.0.weight.init=nope"]}, "nope"),
        ({"extra": ["--set", "train.batch_norm=train"]}, "batch_norm"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_mistake_leaves_nothing_behind(world, tmp_path, command, change, message):
    out = tmp_path / "runs" / "out"
    model, recipe = change.get("model", world.model), change.get("recipe", "w4a4")
    words = (command, model, "-r", recipe, "-d", change.get("data", world.voc), *SETS, "-o", out)
    result = qdetr(*words, *change.get("extra", []))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_finetune_that_fails_late_can_be_tried_again(world, tmp_path):
    """The trainer's own checks come last; after them the same --out must still be free."""
    out = tmp_path / "out"
    words = ("finetune", world.model, "-r", "float", "--data", world.voc, *SETS, "-o", out)
    assert "train.freeze: neck" in refused(*words, "--set", "train.freeze=neck.*", "--tensorboard")
    assert not out.exists()
    assert "nothing" in refused(*words, "--resume") or "no run to resume" in refused(*words, "--resume")


def test_an_out_that_holds_something_is_left_as_it_is(world, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    for command in ("quantize", "finetune"):
        words = (command, world.model, "-r", "w4a4", "--data", world.voc, "-o", tmp_path)
        assert "already holds something; choose another --out" in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["64", "64x", "axb", "16x64", "-64x64"])
def test_a_bad_size_is_refused(world, size):
    assert f"--size {size}: is not HxW" in refused("inspect", world.model, f"--size={size}")


def test_set_without_a_recipe_is_refused(world):
    assert "--set train.epochs=3: changes a recipe, and none is given" in refused(
        "inspect", world.model, "--set", "train.epochs=3"
    )


def test_a_hub_id_without_network_is_one_message(world, tmp_path):
    message = refused("inspect", "facebook/detr-resnet-50")
    assert "facebook/detr-resnet-50: is no folder here, and the Hugging Face hub does not give it" in message


def test_what_is_supported_of_each_family_is_listed():
    found = as_json("plugins", "--plugins", SAMPLES)["families"]
    rows = {row["family"]: row for row in found}
    assert rows["d_fine"]["original files"] == "Peterande/D-FINE"
    assert found[-1]["family"] == "anchor_detr"  # a plugin's, after those built in
    assert rows["anchor_detr"]["attention"] == "dense"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--original", "legs=4"], "--original legs=4: is not NAME=VALUE with one of heads, dilation"),
        (["--original", "heads"], "--original heads: heads is a whole number"),
        (["--original", "queries=many"], "queries is a whole number"),
        (["--original", "dilation=yes"], "dilation is true or false"),
        (["--heads", "8", "--original", "heads=4"], "--original heads: is said twice, 8 and 4"),
        (["--original", "queries=300"], "queries can only be set for an original .pth"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-1],
)
def test_what_a_pth_does_not_say_is_checked(world, words, message):
    assert message in refused("inspect", world.model, *words)


def test_options_of_a_pth_are_refused_on_folders(world):
    for model in (world.model, world.quantized):
        assert "can only be set for an original .pth" in refused(
            "eval", model, "--data", world.voc, "--no-dilation"
        )


def test_quantizing_by_a_recipe_that_quantizes_nothing_is_refused(world, tmp_path):
    words = ("quantize", world.model, "-r", "float", "--data", world.voc, "-o", tmp_path / "q")
    assert "quantizes nothing" in refused(*words)
    words = ("quantize", world.quantized, "-r", "w4a4", "--data", world.voc, "-o", tmp_path / "q")
    assert "is a fake-quant checkpoint" in refused(*words)
    assert not (tmp_path / "q").exists()
