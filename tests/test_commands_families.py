"""Every family through every command, as a user types them: tiny models, images of odd sizes, two steps."""

import json
from pathlib import Path

import pytest
import torch
from tiny_detectors import CONFIGS
from tiny_runs import SETS, as_json, refused, write_model, write_voc

from qdetr_cli import pipeline, running, student
from qdetr_cli.families import FAMILIES, REFUSED

RECIPE = ("--recipe", "w4a4_attn4")
CLASSES = ("ant", "bee", "cow")
MORE = (*(f"animal {number}" for number in range(17)), *CLASSES)  # the data has a few of the model's classes
SIZES = ((61, 90), (80, 53))  # width, height
PIXELS = {
    "padded": {"size": {"shortest_edge": 72, "longest_edge": 110}},
    "squashed": {"size": {"height": 96, "width": 64}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", CLASSES, SIZES)


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """States that were saved, modules that were opened."""
    seen: dict[str, list] = {"saved": [], "opened": []}
    save, open_ = student.save_model, pipeline.open_model

    def saved(module, *rest):
        seen["saved"].append({name: each.clone() for name, each in module.state_dict().items()})
        save(module, *rest)

    def opened(*arguments):
        model = open_(*arguments)
        seen["opened"].append(model.module)
        return model

    for module in (student, pipeline):
        monkeypatch.setattr(module, "save_model", saved)
    for module in (student, pipeline, running):
        monkeypatch.setattr(module, "open_model", opened)
    return seen


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", FAMILIES, ids=str)
def test_every_command(name, data, seen, tmp_path):
    assert name in CONFIGS
    family = FAMILIES[name]
    classes = MORE if list(FAMILIES).index(name) % 2 and family.trainable else CLASSES
    model, named = write_model(tmp_path / "model", name, classes, **PIXELS), ("--data", data)

    found = as_json("inspect", model, *RECIPE)
    assert (found["family"], len(found["classes"]), found["notes"]) == (name, len(classes), [])

    found = as_json("quantize", model, *RECIPE, *named, "--out", tmp_path / "ptq", *SETS[:2])
    assert found["calibrated"]["ap"] is not None

    words = (
        "finetune",
        tmp_path / "ptq",
        *RECIPE,
        *named,
        *SETS,
        "--teacher",
        model,
        "--out",
        tmp_path / "qat",
    )
    if family.trainable:
        assert as_json(*words)["steps"] == 2
    else:
        assert "has no loss" in refused(*words)
    out = tmp_path / ("qat/last" if family.trainable else "ptq")

    found = as_json("eval", out, *named, "--ladder", "--workers", "0")
    assert found["ladder"][0]["rung"] == "float"
    assert len(found["ladder"]) > 6
    assert same(seen["opened"][-1].state_dict(), seen["saved"][-1])

    image = data / "JPEGImages" / "val1.jpg"
    (found,) = as_json("predict", out, image, "--threshold", "0", "--out", tmp_path / "boxes")["images"]
    assert found["objects"]
    assert {each["class"] for each in found["objects"]} <= set(classes)


@pytest.mark.parametrize("name", REFUSED, ids=str)
def test_what_is_no_such_detector_is_refused_with_the_reason(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    message = refused("inspect", tmp_path)
    assert f"model_type '{name}' is not supported: {REFUSED[name]}" in message
    assert "conditional_detr" in message


def test_a_family_without_a_loss_is_refused_before_anything_is_written(data, tmp_path):
    model = write_model(tmp_path / "model", "pp_doclayout_v2", CLASSES)
    words = (model, *RECIPE, "--data", data, *SETS, "--out", tmp_path / "out")
    assert "pp_doclayout_v2: transformers has no loss for it" in refused("finetune", *words)
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_loss_gets_no_new_class_head(data, tmp_path):
    model = write_model(tmp_path / "model", "pp_doclayout_v2", ("text", "title", "table"))
    words = (model, *RECIPE, "--data", data, *SETS[:2], "--out", tmp_path / "out")
    message = refused("quantize", *words)
    assert "the model has no class for ant, bee, cow; it knows text, title, table" in message
    assert "cannot be trained, so give it data of its own classes" in message
