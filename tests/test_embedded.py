"""The embedded detectors: truly trained, and what the commands say of them agrees with pycocotools."""

import contextlib
import io
import json

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import as_json

from qdetr_cli.demo import MODELS
from qdetr_cli.scene_files import write_scenes

NAMES = ("conditional_detr", "d_fine")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=48, val=120)
    return folder


@pytest.fixture(scope="module", params=NAMES)
def measured(request, scenes, tmp_path_factory):
    """(name, what eval printed, its folder) of one embedded detector in float."""
    out = tmp_path_factory.mktemp("eval") / "out"
    body = as_json("eval", MODELS / request.param, "--data", scenes / "coco", "--workers", 0, "--out", out)
    return request.param, body, out


def test_the_float_detector_finds_digits(measured):
    assert measured[1]["ap50_voc_area"] > 0.85


def test_detections_json_gives_the_printed_numbers_to_pycocotools(measured, scenes):
    _, body, out = measured
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(scenes / "coco" / "annotations" / "instances_val.json"))
        judge = COCOeval(truth, truth.loadRes(str(out / "detections.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    found = [body["ap"], body["ap50"], body["ap75"]]
    assert found == pytest.approx(judge.stats[:3].tolist(), abs=2e-3)  # boxes are rounded in the file
    assert {row["category_id"] for row in json.loads((out / "detections.json").read_text())} <= set(
        range(1, 11)
    )


def test_eight_bits_lose_next_to_nothing_and_two_bits_a_third_or_more(measured, scenes, tmp_path):
    name, body, _ = measured
    words = ("--data", scenes / "voc", "--set", "calibrate.images=48")
    eight = as_json("quantize", MODELS / name, "--recipe", "w8a8", "--out", tmp_path / "8", *words)
    two = as_json("quantize", MODELS / name, "--recipe", "w2a2", "--out", tmp_path / "2", *words)
    assert eight["float"]["ap50_voc_area"] == pytest.approx(body["ap50_voc_area"], abs=1e-6)
    assert eight["calibrated"]["ap50_voc_area"] == pytest.approx(body["ap50_voc_area"], abs=0.01)
    assert two["calibrated"]["ap50_voc_area"] < 0.67 * body["ap50_voc_area"]
