"""`qdetr export`: a file that is run and compared before it is there, and what keeps it from being there."""

import contextlib
import errno
import json
import shutil
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from exported_files import metadata, write_onnx
from tiny_runs import SETS, Told, as_json, ok, refused, write_model

from qdetr_cli import comparison, delivery, exporting
from qdetr_cli.artefact import open_artefact
from qdetr_cli.errors import ExportError
from qdetr_cli.export.metadata import Metadata
from qdetr_cli.instructions import sums_overflow
from qdetr_cli.models import Model, Source, open_model
from qdetr_cli.processors import Processor
from qdetr_cli.recipe import Export
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.sessions import open_session

FILES = {"onnx": ".onnx", "openvino": ".xml"}
RUNTIMES = pytest.mark.parametrize("to", FILES)


class World:
    """A tiny DETR, digit scenes, what `quantize` makes of it, and its exports."""

    def __init__(self, root: Path):
        self.root = root
        self.model = write_model(root / "model")
        write_scenes(root / "scenes", train=4, val=3, size=64)
        self.data = root / "scenes" / "voc"
        self.quantized = root / "quantized"
        common = ("--data", self.data, *SETS[:2], "--no-measure")
        ok("quantize", self.model, "-r", "w4a4", *common, "-o", self.quantized)
        self.files = {to: root / f"exported{suffix}" for to, suffix in FILES.items()}
        self.told = {
            to: as_json(
                "export", self.quantized, "--to", to, "-o", path, "-d", self.data, "--threads", 1,
                "--size", "64x96",
            )
            for to, path in self.files.items()
        }  # fmt: skip

    @cached_property
    def opened(self) -> Model:
        return open_model(Source(str(self.quantized)), lambda text: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def opened(world, monkeypatch) -> Model:
    """The fake-quant model; `export` finds it open, which saves seconds."""
    monkeypatch.setattr(delivery, "open_model", lambda *rest: world.opened)
    return world.opened


# --- what it writes and says ---


@RUNTIMES
def test_export_tells_sizes_parity_kernels_and_ap(world, to):
    found = world.told[to]
    assert set(found) == {
        "to", "files", "quantized", "size", "size_mb", "float_size_mb", "kernels", "parity", "metrics",
        "seconds", "versions",
    }  # fmt: skip
    files = [world.files[to]] + ([world.files[to].with_suffix(".bin")] if to == "openvino" else [])
    assert found["files"] == [str(path) for path in files]
    assert found["size_mb"] == round(sum(path.stat().st_size for path in files) / 1e6, 3)
    assert found["quantized"]
    assert found["parity"]["holds"]
    for kind in ("convolution", "linear", "product"):
        if (to, kind) != ("openvino", "product") or not sums_overflow():  # there they would overflow
            assert found["kernels"][kind]["integer"] > 0
        assert found["kernels"][kind]["all"] - found["kernels"][kind]["integer"] == sum(
            each["kind"] == kind for each in found["kernels"]["float"]
        )
    assert found["metrics"]["file"]["ap"] == pytest.approx(found["metrics"]["model"]["ap"], abs=0.005)


@RUNTIMES
def test_the_file_says_what_it_is(world, to):
    session = open_session(world.files[to], threads=1)
    told = Metadata.from_json(session.metadata)
    model = world.opened
    assert session.inputs.size == told.size == (64, 96)
    assert session.inputs.batch == 1
    assert told.class_names == model.detector.class_names
    assert told.processor == model.detector.processor.to_config()
    assert told.recipe == model.recipe.to_dict()
    assert told.portable == sums_overflow()  # as this processor needs it
    assert (told.family, told.source) == ("detr", "quantized")
    assert str(world.root) not in json.dumps(told.processor) + told.source


@RUNTIMES
def test_the_file_computes_what_the_model_does(world, to):
    model = world.opened
    artefact = open_artefact(world.files[to], threads=1)
    pixels = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 64, 96, dtype=torch.int64)
    mask[0, :, 40:] = 0
    with torch.no_grad():
        wanted = model.module.eval()(pixel_values=pixels, pixel_mask=mask)
    found = artefact.detector.model(pixel_values=pixels, pixel_mask=mask)
    away = (found.logits - wanted.logits).norm() / wanted.logits.norm()
    assert away < 0.02  # a code that rounding moves to its neighbour, here and there
    unmasked = artefact.detector.model(pixel_values=pixels, pixel_mask=torch.ones_like(mask))
    assert (unmasked.logits[0] - found.logits[0]).norm() / found.logits[0].norm() > 10 * away


@RUNTIMES
def test_a_file_for_any_size_computes_what_the_model_does_at_each(world, opened, to, tmp_path):
    path = tmp_path / f"any{FILES[to]}"
    found = as_json("export", world.quantized, "--to", to, "-o", path, "--size", "any", "-d", world.data)
    assert found["size"] is None
    assert found["parity"]["holds"]
    fixed, free = (each["kernels"]["convolution"]["integer"] for each in (world.told[to], found))
    assert free == fixed if to == "openvino" else 0 < free < fixed  # there windows are gathered by constants
    artefact = open_artefact(path, threads=1)
    assert artefact.session.inputs.size is artefact.metadata.size is None
    for size in ((64, 96), (160, 64), (97, 131)):
        pixels = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(8, *size, dtype=torch.int64)
        with torch.no_grad():
            wanted = opened.module.eval()(pixel_values=pixels, pixel_mask=mask).logits
        logits = artefact.detector.model(pixel_values=pixels, pixel_mask=mask).logits
        away = (logits - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert away.median() < 1e-4, size  # one code of four bits that rounding moves is 6 %
        assert away.max() < 0.2, size


def test_a_float_model_is_exported_as_float(world, tmp_path):
    path = tmp_path / "float.onnx"
    text = ok("export", world.model, "--to", "onnx", "-o", path, "--size", "64x64", "--batch", "any").stdout
    artefact = open_artefact(path, threads=1)
    assert not artefact.metadata.quantized
    assert artefact.session.inputs.batch is None
    assert "file against model on 16 images" in text
    assert "in ONNX Runtime" in text
    assert "portable" not in text  # nothing of a float model overflows
    assert "in float, a float model: " in text
    assert f"{path}: written" in text


@pytest.mark.parametrize(
    ("to", "name"),
    [
        pytest.param("onnx", "m.onnx", id="onnx", marks=pytest.mark.slow),
        pytest.param("openvino", "m.xml", id="openvino"),
    ],
)
def test_what_no_flag_says_the_recipe_says(world, tmp_path, monkeypatch, to, name):
    model = open_model(Source(str(world.quantized)), lambda text: None)
    said = Export(to=to, size=(96, 64), portable=True)
    recipe = model.recipe.model_copy(update={"export": said})
    monkeypatch.setattr(delivery, "open_model", lambda source, say: replace(model, recipe=recipe))
    found = as_json("export", world.quantized, "-o", tmp_path / name)
    assert (found["to"], found["size"]) == (to, [96, 64])
    assert Metadata.from_json(open_session(tmp_path / name, threads=1).metadata).portable


@pytest.mark.parametrize("flag", ["--portable", "--no-portable"])
def test_a_float_model_is_neither_portable_nor_not(world, tmp_path, flag):
    fault = refused("export", world.model, "--to", "onnx", "-o", tmp_path / "m.onnx", flag)
    assert "--portable would have no effect on a float model" in fault


def test_packed_is_a_folder_of_integers(world, opened, tmp_path):
    found = as_json("export", world.quantized, "--to", "packed", "-o", tmp_path / "packed")
    assert {Path(path).name for path in found["files"]} == {"qdetr.json", "model.safetensors"}
    assert found["parity"] is None
    assert found["kernels"] is None
    assert open_model(Source(str(tmp_path / "packed")), lambda text: None).packed


# --- files where models were taken ---


@pytest.mark.parametrize("overflow", [False, True], ids=["VNNI", "no VNNI"])
def test_a_file_that_may_overflow_here_is_told(world, tmp_path, monkeypatch, overflow):
    monkeypatch.setattr("qdetr_cli.artefact.sums_overflow", lambda: overflow)
    path = write_onnx(tmp_path / "m.onnx", told=metadata())
    told = " ".join(ok("eval", path, "-d", world.data, "--workers", 0).stdout.split())
    assert ("this processor has no VNNI: sums of its products may overflow" in told) == overflow


@RUNTIMES
def test_eval_gives_the_same_keys_for_a_file_and_a_folder(world, to, tmp_path):
    common = ("-d", world.data, "--workers", 0)
    folder = as_json("eval", world.quantized, *common)
    file = as_json("eval", world.files[to], *common, "--threads", 1, "-o", tmp_path / "out")
    assert list(file) == list(folder)
    assert list(file["per_class"]) == list(folder["per_class"])
    assert file["images"] == 3
    assert (tmp_path / "out" / "metrics.json").exists()


@RUNTIMES
def test_predict_draws_boxes_of_a_file(world, to, tmp_path):
    images = sorted((world.data / "JPEGImages").iterdir())[:2]
    found = as_json("predict", world.files[to], *images, "-o", tmp_path / "p", "--threshold", 0.0)
    names = {*open_artefact(world.files[to], threads=1).detector.class_names.values()}
    assert [Path(each["image"]) for each in found["images"]] == images
    assert {each["class"] for image in found["images"] for each in image["objects"]} <= names
    assert all(len(image["objects"]) == 7 for image in found["images"])  # one for each query
    assert len(list((tmp_path / "p").iterdir())) == 3


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (("eval", "--ladder"), "is an exported file, whose quantizers cannot be switched"),
        (("eval", "--device", "cuda"), "exported files run on the CPU"),
        (("eval", "--heads", "8"), "heads can only be set for an original .pth"),
    ],
    ids=["ladder", "device", "heads"],
)
def test_what_a_file_cannot_do_is_refused(world, command, fault):
    name, *rest = command
    assert fault in refused(name, world.files["onnx"], "-d", world.data, *rest)


@pytest.mark.parametrize("command", ["inspect", "quantize", "finetune", "export"])
def test_commands_that_need_a_model_refuse_a_file(world, command, tmp_path):
    data = ("-r", "w4a4", "-d", world.data, "-o", tmp_path / "out")
    rest = {"inspect": (), "export": ("--to", "onnx", "-o", tmp_path / "o.onnx")}.get(command, data)
    message = refused(command, world.files["onnx"], *rest)
    assert "is an exported file: `qdetr eval`, `predict` and `benchmark` run it" in message
    assert not list(tmp_path.iterdir())


# --- mistakes: one message, and nothing is left ---


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--to", "tensorrt", "-o", "m.engine"), "--to tensorrt: is not one of onnx, openvino, packed"),
        (("--to", "onnx", "-o", "m.xml"), "--to onnx writes a file whose name ends in .onnx"),
        (("--to", "openvino", "-o", "m.onnx"), "--to openvino writes a file whose name ends in .xml"),
        (("--to", "onnx", "-o", "m.onnx", "--size", "20x20"), "is not HxW with at least 32 pixels"),
        (("--to", "onnx", "-o", "m.onnx", "--batch", "0"), "--batch 0: is not a number of images, nor any"),
        (("--to", "packed", "-o", "m", "--size", "64x64"), "--size would have no effect"),
        (("--to", "packed", "-o", "m", "--portable"), "--portable would have no effect"),
        (("--to", "onnx", "-o", "file/m.onnx"), "is a file, so"),
    ],
    ids=["target", "suffix", "other suffix", "size", "batch", "no effect", "packed is portable", "no folder"],
)
def test_mistakes_are_found_before_anything_slow(world, tmp_path, monkeypatch, options, fault):
    monkeypatch.setattr(delivery, "open_model", lambda *rest: pytest.fail("the model was opened"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert fault in refused("export", world.quantized, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", ["m.xml", "m.bin"])
def test_a_file_that_exists_is_not_overwritten(world, tmp_path, there):
    (tmp_path / there).write_text("mine")
    message = refused("export", world.quantized, "--to", "openvino", "-o", tmp_path / "m.xml")
    assert f"{there}: is there already; choose another --out or remove it" in message
    assert (tmp_path / there).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("to", "missing", "name"),
    [("onnx", "onnxruntime", "ONNX Runtime"), ("openvino", "openvino", "OpenVINO"), ("onnx", "onnx", "onnx")],
    ids=["onnxruntime", "openvino", "onnx"],
)
def test_a_missing_extra_is_one_line(world, tmp_path, monkeypatch, to, missing, name):
    monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path / f"m{FILES[to]}"
    message = refused("export", world.quantized, "--to", to, "-o", out)
    assert message == f'error: --to {to} needs {name}: pip install "qdetr[export]"'


def test_a_size_that_the_family_cannot_divide_is_refused(tmp_path):
    model = write_model(tmp_path / "model", "rt_detr")
    message = refused("export", model, "--to", "onnx", "-o", tmp_path / "m.onnx", "--size", "100x70")
    assert "--size 100x70: this rt_detr needs multiples of 32; for example 96x64" in message


def test_a_disk_that_is_nearly_full_is_seen_before(world, opened, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refused("export", world.quantized, "--to", "onnx", "-o", tmp_path / "m.onnx")
    assert "0 MB are free, and writing m.onnx may take" in message
    assert not list(tmp_path.iterdir())


@RUNTIMES
def test_a_disk_that_fills_up_leaves_nothing(world, opened, tmp_path, monkeypatch, to):
    def full(model, to, size, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write", full)
    out = tmp_path / "folder" / f"m{FILES[to]}"
    message = refused("export", world.quantized, "--to", to, "-o", out, "--size", "64x64")
    assert f"{out}: cannot be written (No space left on device); nothing was kept" in message
    assert not list((tmp_path / "folder").iterdir())


def test_openvino_says_that_the_disk_is_full(tmp_path, monkeypatch):
    """It raises what it raises for everything."""

    def full(*rest, **options):
        raise RuntimeError("Exception from src/core:\nNo space left on device")

    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(OSError, match="OpenVINO: No space left on device"):
        exporting._saved(None, tmp_path / "m.xml")


def test_a_file_that_computes_something_else_is_not_kept(world, opened, tmp_path, monkeypatch):
    """The file of a model whose biases are others."""

    def wrong(model, to, size, path, **options):
        shutil.copy(world.files["onnx"], path)
        with torch.no_grad():
            biases.add_(1)

    biases = opened.module.class_labels_classifier.bias
    monkeypatch.setattr(exporting, "write", wrong)
    message = refused("export", world.quantized, "--to", "onnx", "-o", tmp_path / "m.onnx")
    with torch.no_grad():
        biases.sub_(1)
    assert "the file does not compute what the model computes" in message
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_ap_is_not_kept(world, monkeypatch):
    artefact = open_artefact(world.files["onnx"], threads=1)
    model = world.opened
    real, seen = comparison.measure, []

    def measure(data, found):
        metrics = real(data, found)
        seen.append(metrics)
        return metrics if len(seen) == 1 else comparison.replace(metrics, ap=metrics.ap + 0.006)

    monkeypatch.setattr(comparison, "measure", measure)
    data = delivery.open_split(delivery.DataSource(world.data), "val", Told())
    with pytest.raises(ExportError, match=r"the file has AP .* more than rounding can explain"):
        comparison.both_metrics(model, artefact, data, Told())


@pytest.mark.parametrize(
    ("size", "count"), [((64, 64), 16), ((640, 640), 16), ((800, 800), 10), ((1333, 1333), 8)], ids=str
)
def test_fewer_large_images_are_compared(size, count):
    found = comparison.sample(Processor(size=(32, 32)), None, size)
    assert found.pixel_values.shape == (count, 3, 32, 32)
    assert len({float(each.sum()) for each in found.pixel_values}) == count


def test_float_exports_leave_the_quantizers_on(world, tmp_path):
    model = world.opened
    pixels, mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.int64)
    with torch.no_grad():
        before = model.module(pixel_values=pixels, pixel_mask=mask).logits
        exporting.write(model, "onnx", (64, 64), tmp_path / "f.onnx", quantized=False)
        after = model.module(pixel_values=pixels, pixel_mask=mask).logits
    assert torch.equal(before, after)
    file = open_artefact(tmp_path / "f.onnx", threads=1)
    assert not file.metadata.quantized
    found = file.detector.model(pixel_values=pixels, pixel_mask=mask).logits
    with exporting._float_mode(model), torch.no_grad():
        wanted = model.module(pixel_values=pixels, pixel_mask=mask).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_an_interrupted_export_leaves_nothing(world, opened, tmp_path, monkeypatch):
    def interrupted(model, to, size, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        delivery.export(
            Source(str(world.quantized)), to="onnx", out=tmp_path / "m.onnx", size="64x64", listener=Told()
        )
    assert not list(tmp_path.iterdir())
