"""Exported files of strangers: one message, or a right answer; no file outside the folder, no gigabytes."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from exported_files import metadata, write_file
from hostile import FUZZ, changed, damaged, outcome
from hypothesis import given, settings
from tiny_runs import refused

from qdetr_cli.artefact import Artefact, open_artefact
from qdetr_cli.scene_files import write_scenes

SUFFIXES = pytest.mark.parametrize("suffix", [".onnx", ".xml"])
BOMB = '<!ENTITY a0 "x">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
SOME = settings(FUZZ, max_examples=40)


def used(path: Path) -> Artefact:
    """The file, opened and run on two images."""
    artefact = open_artefact(path, threads=1)
    height, width = artefact.session.inputs.size or (64, 96)
    given_ = {"pixel_values": torch.zeros(2, 3, height, width), "pixel_mask": torch.ones(2, height, width)}
    found = artefact.detector.model(**given_)
    assert found.logits.shape[:2] == found.pred_boxes.shape[:2]
    assert max(artefact.detector.class_names) < found.logits.shape[2]
    return artefact


@pytest.mark.parametrize("part", [".onnx", ".xml", ".bin"])
def test_damaged_files(tmp_path, part):
    path = write_file(tmp_path / ("m.onnx" if part == ".onnx" else "m.xml"), told=metadata())
    target = path.with_suffix(part)
    whole, said = target.read_bytes(), set()

    @SOME
    @given(damaged(whole))
    def check(content: bytes) -> None:
        target.write_bytes(content)
        said.add(outcome(lambda: used(path)))

    check()
    messages = said - {"right"}
    assert all(str(tmp_path) in message for message in messages)
    assert messages


def test_metadata_that_lies(tmp_path):
    """Whatever one of its values becomes."""
    whole = json.loads(metadata().to_json())
    said = set()

    @settings(FUZZ, max_examples=25)
    @given(changed(whole))
    def check(content: object) -> None:
        path = write_file(tmp_path / "m.onnx", told=json.dumps(content))
        said.add(outcome(lambda: open_artefact(path, threads=1)))

    check()
    assert any("metadata" in message for message in said)


@SUFFIXES
@pytest.mark.parametrize("index", [-1, 11, 10**12])
def test_classes_that_the_file_does_not_tell(tmp_path, suffix, index):
    path = write_file(tmp_path / f"m{suffix}", told=metadata(class_names={0: "one", index: "other"}))
    assert f"names class {index}, and its logits have 11 classes" in outcome(lambda: used(path))


@pytest.mark.parametrize(
    ("name", "asked"),
    [("m.onnx", {"size": (10**5, 10**5)}), ("m.xml", {"size": (10**5, 10**5)}), ("m.onnx", {"batch": 10**9})],
    ids=["size, onnx", "size, openvino", "batch"],
)
def test_more_pixels_than_memory_can_hold(tmp_path, name, asked):
    path = write_file(tmp_path / name, told=metadata(), **asked)
    assert "pixels, more than qdetr makes" in outcome(lambda: used(path))


@pytest.mark.parametrize("place", ["../secret.bin", "sub/../../secret.bin", "link.bin", "{root}/secret.bin"])
def test_weights_outside_the_folder_are_not_read(tmp_path, place):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = write_file(folder / "m.onnx", told=metadata())
    model = onnx.load(path)
    (boxes,) = [each for each in model.graph.initializer if each.name == "boxes"]
    boxes.ClearField("raw_data")
    boxes.data_location = onnx.TensorProto.EXTERNAL
    told = {"location": place.format(root=tmp_path), "offset": "0", "length": "32"}
    for key, value in told.items():
        boxes.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    assert f"{path}: ONNX Runtime cannot load it" in outcome(lambda: used(path))


@pytest.mark.parametrize(
    ("declared", "used_as"),
    [
        (BOMB, "&a9;"),
        ('<!ENTITY secret SYSTEM "file:///etc/hostname">', "&secret;"),
    ],
    ids=["bomb", "external"],
)
def test_entities_are_not_expanded(tmp_path, declared, used_as):
    path = write_file(tmp_path / "m.xml", told=metadata(source="SOURCE"))
    head, body = path.read_text(encoding="utf-8").split("?>", 1)
    assert "SOURCE" in body
    path.write_text(f"{head}?><!DOCTYPE net [{declared}]>{body.replace('SOURCE', used_as)}", encoding="utf-8")
    opened = []
    outcome(lambda: opened.append(used(path)))
    assert [each.metadata.source for each in opened] in ([], [used_as])


def test_every_command_says_it_in_one_message(tmp_path):
    write_scenes(tmp_path / "scenes", train=1, val=1, size=64)
    data, image = tmp_path / "scenes" / "voc", next((tmp_path / "scenes" / "voc" / "JPEGImages").iterdir())
    path = write_file(tmp_path / "m.onnx", told=metadata())
    path.write_bytes(path.read_bytes()[:500])
    for command in (
        ("eval", path, "-d", data),
        ("predict", path, image, "-o", tmp_path / "predicted"),
        ("benchmark", path),
        ("inspect", path),
    ):
        said = refused(*command)
        assert "m.onnx" in said
        assert "Traceback" not in said
    assert not (tmp_path / "predicted").exists()
