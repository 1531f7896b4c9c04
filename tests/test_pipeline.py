"""The stories: what a checkpoint keeps, what goes on from it, and what is said or refused on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import FAST, Told, listener, write_coco, write_model, write_original

from qdetr_cli import checkpoint, pipeline, plugins, running
from qdetr_cli.checkpoint import load_float
from qdetr_cli.data import open_data
from qdetr_cli.devices import torch_device
from qdetr_cli.errors import CheckpointError, DataError, PluginError, RecipeError, RunError
from qdetr_cli.manifest import read_manifest
from qdetr_cli.models import Source, known_classes, open_model, source_of, trace_size
from qdetr_cli.results import DataSource
from qdetr_cli.rewrite import quantizers, set_enabled
from qdetr_cli.runs import Journal

SIZES = ((80, 60), (60, 90), (64, 64), (96, 50))  # width, height: batches are padded
PLUGIN = """
from qdetr_cli.plugins import register
from qdetr_cli.quantizers import LSQ

@register("quantizer", "halved")
class Halved(LSQ):
    def live_step(self):
        return self.step.detach() * 0.5
"""
MINE = """
schema: 1
extends: w4a4
plugins: [mine]
rules:
  - {role: backbone, weight: {bits: 4, quantizer: halved}}
"""


class World:
    """A tiny DETR for cats and dogs, data of them in many sizes, and the calibrated model."""

    def __init__(self, root: Path):
        self.root = root
        self.model = Source(str(write_model(root / "model", classes=("cat", "dog"))))
        self.data = DataSource(write_coco(root / "coco", SIZES))
        self.quantized = Source(str(root / "quantized"))
        self.result = self.quantize(root / "quantized")

    def quantize(self, out, source=None, *, recipe="w4a4", told=None, data=None, sets=(), **options):
        return pipeline.quantize(
            source or self.model,
            recipe=recipe,
            data=data or self.data,
            out=out,
            overrides=[FAST[0], *sets],
            listener=told or listener(),
            **options,
        )

    def finetune(self, out, source=None, *, recipe="w4a4", told=None, data=None, sets=(), **options):
        return pipeline.finetune(
            source or self.model,
            recipe=recipe,
            data=data or self.data,
            out=out,
            overrides=[*FAST, *sets],
            listener=told or listener(),
            **options,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def outputs(source: Source | str) -> torch.Tensor:
    source = Source(source) if isinstance(source, str) else source
    return open_model(source, print).module(pixel_values=pixels()).logits


# --- quantize ---


def test_a_fake_quant_checkpoint_gives_the_same_bits_again(world, tmp_path, monkeypatch):
    kept = []
    save = pipeline.save_model
    monkeypatch.setattr(
        pipeline, "save_model", lambda module, *rest: (kept.append(module), save(module, *rest))
    )
    world.quantize(tmp_path / "q", measured=False)
    with torch.no_grad():
        before = kept[0](pixel_values=pixels())
        after = open_model(Source(str(tmp_path / "q")), print).module(pixel_values=pixels())
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.pred_boxes, after.pred_boxes)
    assert not torch.equal(after.logits, outputs(world.model))


def test_with_quantizers_off_it_is_the_float_model(world):
    model = open_model(world.quantized, print).module
    set_enabled(model, None, False)
    with torch.no_grad():
        off = model(pixel_values=pixels()).logits
    torch.testing.assert_close(off, outputs(world.model), rtol=1e-4, atol=1e-5)


def test_quantize_says_what_it_made(world):
    assert world.result.silent == ()
    assert world.result.before is not None
    assert world.result.after is not None
    manifest = read_manifest(world.root / "quantized")
    assert (manifest.kind, manifest.class_names) == ("fake-quant", {0: "cat", 1: "dog"})
    assert manifest.metrics == world.result.after.to_dict()
    assert str(world.root) not in json.dumps(manifest.to_dict())


def test_images_that_are_trained_on_too_are_said(world, tmp_path):
    told, file = Told(), world.data.path / "annotations" / "instances_train.json"
    images = world.data.path / "train"
    world.quantize(tmp_path / "a", told=told, data=DataSource(file, images=images))
    assert "4 of 4 images to measure on are in the training split too" in told.text


def test_a_split_may_be_a_json_of_its_own(world, tmp_path):
    told, folder = Told(), world.data.path / "annotations"
    data = DataSource(folder / "instances_train.json", split=str(folder / "instances_val.json"))
    world.quantize(tmp_path / "a", told=told, data=data)
    assert "instances_val.json: COCO, split instances_val, 4 images" in told.text
    assert "training split too" not in told.text


# --- finetune ---


def test_training_goes_on_from_a_fake_quant_checkpoint(world, tmp_path):
    with pytest.raises(RunError, match="needs a float MODEL; name the float checkpoint with --teacher"):
        world.finetune(tmp_path / "f", world.quantized)
    with pytest.raises(RunError, match="quantized under another plan"):
        world.finetune(tmp_path / "f", world.quantized, recipe="w3a3", teacher=world.model.model)
    with pytest.raises(RunError, match="this recipe quantizes nothing"):
        world.finetune(tmp_path / "f", world.quantized, recipe="float")
    assert not (tmp_path / "f").exists()
    fit = world.finetune(tmp_path / "f", world.quantized, teacher=world.model.model).fit
    assert fit.steps == 2
    before, after = outputs(world.quantized), outputs(str(tmp_path / "f" / "last"))
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, rtol=0, atol=1.0)  # it began from there


def test_the_same_plan_from_another_file_is_the_same_plan(world, tmp_path):
    recipe = tmp_path / "again.yaml"
    recipe.write_text("schema: 1\nextends: w4a4\n\n# moved lines\n")
    sets = ["distill.teacher=null", "distill.terms={}"]
    assert world.finetune(tmp_path / "f", world.quantized, recipe=str(recipe), sets=sets).fit.steps == 2


def test_other_classes_get_a_new_head_and_no_teacher_and_both_are_said(world, tmp_path):
    source = Source(str(write_model(tmp_path / "digits")))
    told = Told()
    world.finetune(tmp_path / "f", source, told=told)
    assert "the checkpoint has no class for cat, dog: it gets a new class head of 2 classes" in told.text
    assert "no teacher, because its class head would be new too" in told.text
    model = open_model(Source(str(tmp_path / "f")), print)
    assert model.detector.class_names == {0: "cat", 1: "dog"}


def test_a_teacher_with_other_classes_or_of_low_bits_is_refused(world, tmp_path):
    digits = write_model(tmp_path / "digits")
    with pytest.raises(RunError, match="has other classes than the student"):
        world.finetune(tmp_path / "f", teacher=str(digits))
    with pytest.raises(RunError, match="is a fake-quant checkpoint"):
        world.finetune(tmp_path / "f", teacher=world.quantized.model)


def test_a_teacher_of_another_family_takes_part(world, tmp_path):
    teacher = write_model(tmp_path / "table", "table-transformer", classes=("cat", "dog"))
    told = []
    watched = Told()
    watched.stepped = lambda step, total, entry: told.append(entry)
    world.finetune(tmp_path / "f", teacher=str(teacher), told=watched)
    assert all(entry["distill_logits"] > 0 for entry in told)


def test_a_class_that_only_the_evaluation_has_is_told_before_training(world, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(world.data.path, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "yak"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the model has no class for yak"):
        world.finetune(tmp_path / "f", data=DataSource(root))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "sets",
    [
        ["train.precision=bf16"],
        ["train.accumulate=2"],
        ["train.augment.scales=[48, 64]", "train.augment.crop=0.5", "train.augment.flip=1"],
        ["train.ema=null", "train.schedule=step", "train.quantizer_lr=1e-3", "train.auxiliary=false"],
        ["train.workers=1", "train.epochs=1", "train.steps=null"],
    ],
    ids=["bf16", "accumulate", "multi-scale and crop", "no EMA", "epochs, worker"],
)
def test_training_options_work_on_padded_batches(world, tmp_path, sets):
    fit = world.finetune(
        tmp_path / "f", world.quantized, sets=["distill={teacher: null, terms: {}}", *sets]
    ).fit
    assert fit.steps == 2
    assert bool(torch.isfinite(outputs(str(tmp_path / "f" / "last"))).all())


def test_scales_that_a_pyramid_cannot_halve_are_refused(world, tmp_path):
    source = Source(str(write_model(tmp_path / "rt", "rt_detr", classes=("cat", "dog"))))
    with pytest.raises(RecipeError, match=r"train\.augment\.scales: 50: rt_detr needs multiples of 32"):
        world.finetune(tmp_path / "f", source, recipe="float", sets=["train.augment.scales=[50, 64]"])
    assert not (tmp_path / "f").exists()


def test_batch_norm_train_is_for_float_and_is_written_frozen(world, tmp_path):
    with pytest.raises(RecipeError, match="batch_norm: train has no effect under quantization"):
        world.finetune(tmp_path / "q", sets=["train.batch_norm=train"])
    world.finetune(tmp_path / "f", recipe="float", sets=["train.batch_norm=train"])
    model = open_model(Source(str(tmp_path / "f" / "last")), print)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.module.modules())
    world.quantize(tmp_path / "q", Source(str(tmp_path / "f" / "last")))


def test_a_run_stopped_before_its_first_checkpoint_begins_again(world, tmp_path):
    out = tmp_path / "f"
    broken = Told()

    def stop(*_):
        raise RunError("stopped")

    broken.stepped = stop
    with pytest.raises(RunError, match="stopped"):
        world.finetune(out, recipe="float", told=broken)
    assert (out / "run.json").exists()
    assert not (out / "last").exists()
    told = Told()
    assert world.finetune(out, recipe="float", told=told).fit.steps == 2
    assert Journal(out / "metrics.jsonl").entries()[-1]["step"] == 2
    shutil.rmtree(out / "last")
    world.finetune(out, recipe="float", told=told, resume=True)
    assert "was stopped before its first checkpoint, so it begins again" in told.text


# --- original files ---


def test_an_original_file_is_quantized_fine_tuned_and_evaluated(world, tmp_path, monkeypatch):
    """Two numbered classes are cat and dog by position; images are small, to be quick."""
    small = open_model(world.model, print).detector.processor
    monkeypatch.setattr(checkpoint.Processor, "from_config", lambda config, default: small)
    source = Source(str(write_original(tmp_path / "detr.pth", classes=2)))
    told = Told()
    world.finetune(tmp_path / "f", source, told=told)
    assert "new class head" not in told.text
    result = running.evaluate(
        Source(str(tmp_path / "f")), data=world.data, ladder=True, workers=0, listener=told
    )
    assert result.ladder[0].name == "float"
    assert open_model(Source(str(tmp_path / "f")), print).detector.class_names == {0: "class 0", 1: "class 1"}


def test_category_ids_index_original_heads_that_reach_them(world, tmp_path):
    source = Source(str(write_original(tmp_path / "detr.pth", classes=9)))
    data = open_data(world.data.path, split="val")
    assert known_classes(open_model(source, print), data) == (3, 7)


# --- plugins ---


@pytest.fixture
def _table(monkeypatch):
    built_in = {key: each for key, each in plugins._TABLE.items() if each.origin == "built-in"}
    monkeypatch.setattr(plugins, "_TABLE", built_in)
    monkeypatch.setattr(plugins, "_LOADED", set())


@pytest.mark.usefixtures("_table")
def test_a_recipe_with_a_plugin_of_the_users_own(world, tmp_path, monkeypatch):
    """Written beside the recipe. The checkpoint names its folder, but imports it only when the user does."""
    home = tmp_path / "home"
    (home / "mine").mkdir(parents=True)
    (home / "mine" / "halved.py").write_text(PLUGIN)
    (home / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(home)
    world.quantize(tmp_path / "q", recipe="mine.yaml", measured=False)
    monkeypatch.chdir(tmp_path)
    model = open_model(Source("q"), print).module
    assert {type(each).__name__ for each in quantizers(model).values()} == {"LSQ", "Halved"}

    plugins._TABLE.pop(("quantizer", "halved"))
    plugins._LOADED.clear()
    with pytest.raises(PluginError, match=r"needs the quantizer halved .* --plugins .*mine"):
        open_model(Source("q"), print)
    assert ("quantizer", "halved") not in plugins._TABLE, "a checkpoint made code run"
    found = pipeline.inspect(Source("q"), plugins=[home / "mine"], listener=Told())
    assert found.plan is not None


# --- opening ---


def test_options_of_a_pth_are_refused_for_a_checkpoint(world):
    with pytest.raises(CheckpointError, match="can only be set for an original"):
        open_model(source_of(world.quantized.model, heads=4), print)


def test_a_run_folder_means_its_best_checkpoint(world, tmp_path):
    shutil.copytree(world.root / "quantized", tmp_path / "run" / "last")
    said: list[str] = []
    assert open_model(Source(str(tmp_path / "run")), said.append).plan is not None
    shutil.copytree(world.root / "quantized", tmp_path / "run" / "best")
    open_model(Source(str(tmp_path / "run")), said.append)
    assert said == [f"{tmp_path}/run: reading last/", f"{tmp_path}/run: reading best/"]


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:77", "cpu:x", ""])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(RunError, match="choose auto, cpu, cuda"):
        torch_device(name)


def test_predict_keeps_the_size_of_each_image(world, tmp_path):
    Image.new("RGB", (200, 30), "blue").save(tmp_path / "wide.png")
    (found,) = running.predict(world.quantized, [tmp_path / "wide.png"], threshold=0.0, listener=listener())
    assert len(found.boxes) == 7
    assert max(box[2] for box in found.boxes) > 40
    assert max(box[3] for box in found.boxes) < 60
    assert set(found.classes) <= {"cat", "dog"}


def test_the_facts_are_found_at_the_processors_size(world):
    assert trace_size(open_model(world.model, print)) == (64, 64)
    assert load_float(world.model.model).processor.output_size(640, 640) == (64, 64)
