"""OpenVINO models: the values of the fake-quant model, on integer kernels, whatever the grid."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported_models import SIZE, number_format, toy
from family_models import SIZE as FAMILY_SIZE
from family_models import Ready, ready
from processors_without_vnni import PORTABLE, whole_sums
from torch import Tensor, nn
from torch.nn import functional as F

from qdetr_cli.calibrate import set_ranges
from qdetr_cli.export.kernels import Kernels
from qdetr_cli.export.onnx_graph import marked
from qdetr_cli.export.openvino_graph import openvino_model
from qdetr_cli.export.openvino_profile import kernels
from qdetr_cli.export.openvino_topk import keep_order_of_equals
from qdetr_cli.export.program import exported
from qdetr_cli.layers import quantized_layer
from qdetr_cli.rewrite import quantizers

openvino = pytest.importorskip("openvino")

GROUPED = "up:convolution"  # a transposed convolution in groups: OpenVINO has it in float alone


def images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


def compiled(model: nn.Module, size: tuple[int, int] = SIZE, **options):
    made = openvino_model(marked(exported(model, size)), **options)
    return made, openvino.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def outputs(file, pixels: Tensor) -> dict[str, np.ndarray]:
    results = file([pixels.numpy()])
    return {name: results[name] for name in ("logits", "pred_boxes")}


@pytest.mark.parametrize(
    ("bits", "mid_rise", "portable"),
    [
        *((bits, False, False) for bits in (2, 3, 4, 5, 6, 7)),
        *((bits, True, False) for bits in (2, 3)),
        *(pytest.param(*wide, False, marks=whole_sums) for wide in ((8, False), (7, True))),
        (6, False, True),
    ],
    ids=str,
)
def test_every_width_has_the_values_of_its_grid_on_integer_kernels(bits, mid_rise, portable, tmp_path):
    model = toy(bits, mid_rise=mid_rise)
    made, file = compiled(model, portable=portable)
    assert_values(model, file)
    found = profile(made, tmp_path)
    assert [found.count(kind) for kind in ("linear", "product")] == [(3, 3), (2, 2)]
    assert [each.name for each in found.floats()] == [GROUPED]


@pytest.mark.parametrize(("bits", "mid_rise"), [(8, False), (7, True)], ids=str)
def test_a_portable_file_has_what_could_overflow_in_float(bits, mid_rise, tmp_path):
    model = toy(bits, mid_rise=mid_rise)
    made, file = compiled(model, portable=True)
    assert_values(model, file)
    assert not [each for each in profile(made, tmp_path).operations if each.integer]


def assert_values(model: nn.Module, file) -> None:
    with torch.no_grad():
        wanted = model(images(1))
    for name, value in outputs(file, images(1)).items():
        np.testing.assert_allclose(value, getattr(wanted, name), rtol=1e-4, atol=1e-4, err_msg=name)


def profile(model, folder: Path) -> Kernels:
    openvino.save_model(model, folder / "m.xml", compress_to_fp16=False)
    return kernels(folder / "m.xml")


@pytest.fixture(scope="module")
def detector() -> Ready:
    return ready("detr", "w8a8")


@whole_sums  # without VNNI OpenVINO has no integer kernel for a product of heads without a mask
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


class Pyramid(nn.Module):
    """Two maps, one of half the size, joined before a layer reads them: what every FPN does."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        formats = {"weight": number_format("weight", bits), "input": number_format("input", bits)}
        self.fine = quantized_layer(nn.Conv2d(3, 4, 3, padding=1), **formats)
        self.coarse = quantized_layer(nn.Conv2d(3, 4, 3, stride=2, padding=1), **formats)
        self.joined = quantized_layer(nn.Conv2d(8, 4, 1), **formats)
        for path, each in quantizers(self).items():
            each.path = path

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> SimpleNamespace:
        coarse = F.interpolate(self.coarse(pixel_values), scale_factor=2.0, mode="nearest")
        x = self.joined(torch.cat([F.silu(self.fine(pixel_values)), coarse], 1)).flatten(2).mT
        return SimpleNamespace(logits=x, pred_boxes=x.sigmoid())


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=whole_sums)])
def test_maps_are_joined_and_repeated_in_eight_bits(bits):
    torch.manual_seed(0)
    model = Pyramid(bits).eval()
    set_ranges(model, lambda: model(images()))
    _, file = compiled(model)
    with torch.no_grad():
        wanted = model(images(1))
    for name, value in outputs(file, images(1)).items():
        np.testing.assert_allclose(value, getattr(wanted, name), rtol=1e-4, atol=1e-4, err_msg=name)
    kinds = {}
    for node in file.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kinds.setdefault(info["layerType"].astype(str), []).append(info["outputPrecisions"].astype(str))
    assert kinds["Concatenation"] == kinds["Interpolate"] == ["u8"]


@pytest.mark.parametrize("portable", PORTABLE)
def test_values_of_a_detector_at_another_image(detector, portable):
    pixels = images(1, FAMILY_SIZE)
    _, file = compiled(detector.model, FAMILY_SIZE, portable=portable)
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


@pytest.mark.parametrize("batch", [1, 3], ids=str)
@pytest.mark.parametrize(("count", "k"), [(5000, 300), (400, 300), (40, 12), (300, 300)], ids=str)
def test_of_equal_scores_the_first_comes_first(count, k, batch):
    """In two steps or at once; few values, so that most scores have equals, on the border too."""
    from openvino import opset13 as op

    scores = op.parameter([-1, count], np.float32)
    top = op.topk(scores, op.constant(np.int64(k)), 1, "max", "value", "i64")
    model = openvino.Model([top.output(0), top.output(1)], [scores])
    keep_order_of_equals(model)
    given = np.random.default_rng(0).integers(-9, 9, (batch, count)).astype(np.float32)
    given[0] = given[0, 0]  # all alike
    values, indices = openvino.compile_model(model, "CPU")([given]).values()
    wanted = np.argsort(-given, axis=1, kind="stable")[:, :k]
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(given, wanted, 1))
