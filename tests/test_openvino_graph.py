"""OpenVINO models: the values of the fake-quant model, on integer kernels, whatever the grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import SIZE, toy
from family_models import SIZE as FAMILY_SIZE
from family_models import Ready, ready
from torch import Tensor, nn

from qdetr_cli.export.kernels import Kernels
from qdetr_cli.export.onnx_graph import marked
from qdetr_cli.export.openvino_graph import openvino_model
from qdetr_cli.export.openvino_profile import kernels
from qdetr_cli.export.program import exported

openvino = pytest.importorskip("openvino")

GROUPED = "up:convolution"  # a transposed convolution in groups: OpenVINO has it in float alone


def images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def compiled(model: nn.Module, size: tuple[int, int] = SIZE):
    made = openvino_model(marked(exported(model, size)))
    return made, openvino.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def outputs(file, pixels: Tensor) -> dict[str, np.ndarray]:
    results = file([pixels.numpy()])
    return {name: results[name] for name in ("logits", "pred_boxes")}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_has_the_values_of_its_grid_on_integer_kernels(bits, tmp_path):
    model = toy(bits)
    made, file = compiled(model)
    with torch.no_grad():
        wanted = model(images(1))
    got = outputs(file, images(1))
    for name, value in got.items():
        np.testing.assert_allclose(value, getattr(wanted, name), rtol=1e-4, atol=1e-4, err_msg=name)
    found = profile(made, tmp_path)
    assert [found.count(kind) for kind in ("linear", "product")] == [(3, 3), (2, 2)]
    assert [each.name for each in found.floats()] == [GROUPED]


def profile(model, folder: Path) -> Kernels:
    openvino.save_model(model, folder / "m.xml", compress_to_fp16=False)
    return kernels(folder / "m.xml")


@pytest.fixture(scope="module")
def detector() -> Ready:
    return ready("detr", "w8a8")


def test_a_detector_runs_on_integer_kernels_but_for_what_its_plan_keeps_float(detector, tmp_path):
    found = profile(openvino_model(marked(exported(detector.model, FAMILY_SIZE))), tmp_path)
    kept = sum(module.is_float for module in detector.plan.modules if module.op in ("linear", "conv"))
    assert len(found.floats()) == kept == 1
    assert found.count("product")[0] == found.count("product")[1] >= 4


def test_sums_are_added_by_the_convolution_in_eight_bits(detector):
    made, file = compiled(detector.model, FAMILY_SIZE)
    rounded = [each for each in made.get_ordered_ops() if each.get_friendly_name().endswith(".convolution")]
    assert [each.get_attributes()["levels"] for each in rounded] == [1 << 24] * 4
    precisions = [
        info["outputPrecisions"].astype(str)
        for info in (node.get_rt_info() for node in file.get_runtime_model().get_ordered_ops())
        if info["layerType"].astype(str) == "Convolution"
    ]
    assert precisions.count("f32") == 1, "but the last, which the encoder reads"


def test_values_of_a_detector_at_another_image(detector):
    pixels = images(1, FAMILY_SIZE)
    _, file = compiled(detector.model, FAMILY_SIZE)
    with torch.no_grad():
        wanted = detector.model.eval()(pixel_values=pixels)
    mask = np.ones((1, *FAMILY_SIZE), np.int64)
    given = {"pixel_values": pixels.numpy()} | ({"pixel_mask": mask} if len(file.inputs) > 1 else {})
    results = file(given)
    step = 0.05 * wanted.logits.std()  # rounding may move a code or two
    assert (torch.from_numpy(results["logits"]) - wanted.logits).abs().mean() < step
    assert (torch.from_numpy(results["pred_boxes"]) - wanted.pred_boxes).abs().mean() < 0.01


def test_a_layer_with_float_input_is_not_rounded_dynamically():
    made, _ = compiled(toy(4))
    assert made.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).value == "0"
