"""What is saved after calibration and a training step comes back to the last bit, in another process too."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_models import NAMES, SIZE, TRAINABLE, batch, ready, set_mode
from quantized_detectors import inputs, run
from tiny_detectors import tiny_config
from torch import Tensor, nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.losses import detection_loss
from qdetr_cli.models import Model, Source, open_model, save_model, save_packed
from qdetr_cli.recipe import load_recipe

RECIPE = "w4a4_attn4"


def written(name: str, folder: Path) -> nn.Module:
    """The fake-quant model, trained for one step where it can be, which is in `folder` now."""
    made = ready(name, RECIPE)
    model = copy.deepcopy(made.model)
    if name in TRAINABLE:
        set_mode(model, True)
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        detection_loss(model, made.family, batch(), auxiliary=True).total.backward()
        optimizer.step()
    detector = load_config_model(tiny_config(name), None)
    detector.model = model
    whole = Model(detector=detector, facts=made.facts, plan=made.plan, recipe=load_recipe(RECIPE))
    save_model(model, whole, folder, load_recipe(RECIPE), None)
    return model


def outputs(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All that it says in eval mode, and what it says and loses in training."""
    said = run(model, inputs("mask", 2, SIZE), False)
    trained = run(model, inputs("labels" if name in TRAINABLE else "mask", 2, SIZE), True)
    return said | {f"train{key}": value for key, value in trained.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_is_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    model = written(name, tmp_path / "saved")
    torch.manual_seed(99)  # a new process starts anywhere
    opened = open_model(Source(str(tmp_path / "saved")), lambda line: None)
    assert_equal(model.state_dict(), opened.module.state_dict())
    assert opened.plan == ready(name, RECIPE).plan
    said = outputs(opened.module, name)
    assert_equal(outputs(model, name), said)
    save_packed(opened, tmp_path / "packed")
    packed = open_model(Source(str(tmp_path / "packed")), lambda line: None)
    assert_equal(said, outputs(packed.module, name))
    if name in TRAINABLE:
        before = ready(name, RECIPE).model.state_dict()
        moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        assert any(key.endswith("quantizer.step") for key in moved)


ELSEWHERE = """
import sys
from pathlib import Path
import torch
from quantized_detectors import inputs
from test_family_saving import outputs
from qdetr_cli.models import Source, open_model
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = open_model(Source(str(folder / name)), lambda line: None).module
    torch.save({"state": module.state_dict(), "outputs": outputs(module, name)}, folder / f"{name}.pt")
"""


@pytest.mark.parametrize(
    "chosen",
    [("conditional_detr", "d_fine"), pytest.param(("detr", "rf_detr"), marks=pytest.mark.slow)],
    ids=str,
)
def test_another_process_reads_the_same_model(chosen: tuple[str, ...], tmp_path: Path) -> None:
    """Nothing is shared with this process: dense, deformable with denoising, and groups of queries."""
    models = {name: written(name, tmp_path / name) for name in chosen}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), *chosen]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True, timeout=300)
    for name, model in models.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert_equal(model.state_dict(), found["state"])
        assert_equal(outputs(model, name), found["outputs"])


def test_a_step_that_is_lost_is_noticed(tmp_path: Path) -> None:
    """The comparison has teeth: one step put back to its calibrated value changes what is said.

    It is one of the class head, behind which nothing rounds: 4 bits after another may swallow such a change.
    """
    model = written("detr", tmp_path / "saved")
    other = copy.deepcopy(model)
    key = "class_labels_classifier.weight_quantizer.step"
    with torch.no_grad():
        other.get_parameter(key).copy_(ready("detr", RECIPE).model.get_parameter(key))
    with pytest.raises(AssertionError):
        assert_equal(outputs(model, "detr"), outputs(other, "detr"))
