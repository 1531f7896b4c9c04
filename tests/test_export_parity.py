"""Parity of a file: what it computes passes, and every kind of wrong file fails with the layer named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from exported_models import SIZE, WIDTH, Toy, calibrated, images, number_format, run_plain, toy
from family_models import SIZE as FAMILY_SIZE
from family_models import ready
from onnx import numpy_helper
from processors_without_vnni import PORTABLE
from quantized_detectors import inputs
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.calibrate import set_ranges
from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.data import Batch
from qdetr_cli.errors import ExportError
from qdetr_cli.export.layers import LayerParity, inside
from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.openvino_graph import openvino_model
from qdetr_cli.export.ort import bands
from qdetr_cli.export.ort.prepare import prepared
from qdetr_cli.export.parity import Parity, compare
from qdetr_cli.export.probes import OnnxProbe
from qdetr_cli.export.program import exported
from qdetr_cli.export.rounding import BEST, rounding_noise, sqnr
from qdetr_cli.export.ties import LowerIndexFirst
from qdetr_cli.families import family_of
from qdetr_cli.layers import QuantConvTranspose2d
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.trace import trace

MODEL = toy(4)


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    """The plain model, its biases behind the layers: ONNX Runtime rounds those inside to coarse steps."""
    made = with_pairs(marked(exported(MODEL, SIZE, batch=2)))
    for node in list(made.graph.node):
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 2:
            _bias_behind(made, node)
    return made


def _bias_behind(made: onnx.ModelProto, node: onnx.NodeProto) -> None:
    constants = {each.name: each for each in made.graph.initializer}
    name, output = node.input.pop(), node.output[0]
    bias = numpy_helper.from_array(numpy_helper.to_array(constants[name])[:, None, None], f"{name}.behind")
    made.graph.initializer.append(bias)
    node.output[0] = f"{output}.unbiased"
    add = onnx.helper.make_node("Add", [node.output[0], bias.name], [output], name=f"{node.name}.bias")
    made.graph.node.insert(list(made.graph.node).index(node) + 1, add)


def batch() -> Batch:
    given = images(2)
    return Batch(**given, labels=[], image_ids=[], sizes=torch.tensor([SIZE, SIZE]))


class File(torch.nn.Module):
    """An ONNX model as a module."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask) -> SimpleNamespace:
        logits, boxes = run_plain(self.model, {"pixel_values": pixel_values, "pixel_mask": pixel_mask})
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def parity(model: onnx.ModelProto, tmp_path) -> Parity:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return compare(MODEL, File(model), batch(), path)


def changed(proto: onnx.ModelProto, name: str, change: Callable) -> onnx.ModelProto:
    """The model with another value in one of its constants."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    (tensor,) = [each for each in made.graph.initializer if each.name == name]
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), name))
    return made


def test_a_right_file_passes_and_says_so(proto, tmp_path):
    found = parity(proto, tmp_path)
    assert found.holds
    assert found.images == 2
    assert found.logits.largest < 1e-5
    alone = [each for each in found.layers if each.moved is not None]
    assert len(alone) == 10  # six inputs, q, k, probs and v
    assert all(each.moved == 0 for each in alone)
    text = "\n".join(found.lines())
    assert "10 quantizers, each alone: 10 give the same codes" in text
    assert found.to_dict()["holds"] is True


def one_channel(codes: np.ndarray) -> np.ndarray:
    codes[0] = -codes[0]
    return codes


WRONG = {
    "zero point": ("tokens.input_quantizer.zero_point", lambda zero: zero + 4, "tokens.input"),
    "step of an input": ("up.input_quantizer.scale", lambda step: step * 1.07, "up.input"),
    "clip too low": ("tokens.input_quantizer.high", lambda high: high - 3, "tokens.input"),
    "sign of one channel": ("deep.weight_quantizer.codes", one_channel, "up.input"),
    "step of a weight": ("tokens.weight_quantizer.scale", lambda step: step * 1.1, "(q|k|v)_quantizer"),
    "step of a head": ("q_quantizer.steps", lambda step: step * [[[1.0]], [[1.3]]], "probs_quantizer"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_file_fails_and_the_first_wrong_layer_is_named(proto, tmp_path, case):
    name, change, layer = WRONG[case]
    with pytest.raises(ExportError, match=rf"first layer that deviates: {layer}"):
        parity(changed(proto, name, change), tmp_path)


def test_each_layer_answers_for_itself_alone(proto, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(changed(proto, "up.input_quantizer.high", lambda high: high - 5), path)
    first = {name: each[:1] for name, each in images(2).items()}
    wrong = [each.path for each in inside(MODEL, path, first).layers if each.moved]
    assert wrong == ["up.input_quantizer"]


class Astray(OnnxProbe):
    """A file that by itself chose other queries, so that what it computed tells no order of dimensions."""

    def values(self, given):
        found = super().values(given)
        for key in ("probs_quantizer", "v_quantizer"):
            found[key] = np.random.default_rng(0).permuted(found[key].reshape(-1)).reshape(found[key].shape)
        return found


def test_a_layer_is_judged_by_what_it_makes_of_true_codes_where_those_before_went_astray(
    proto, tmp_path, monkeypatch
):
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    monkeypatch.setattr("qdetr_cli.export.layers.probe", Astray)
    first = {name: each[:1] for name, each in images(2).items()}
    found = {each.path: each for each in inside(MODEL, path, first).layers}
    assert found["probs_quantizer"].sqnr < 20.0
    assert found["probs_quantizer"].moved == found["v_quantizer"].moved == 0
    assert all(each.holds for each in found.values())


def test_outputs_may_be_further_than_rounding_explains_where_every_layer_alone_is_right(proto, tmp_path):
    class Noisy(File):
        def forward(self, pixel_values, pixel_mask):
            outputs = super().forward(pixel_values, pixel_mask)
            outputs.logits = outputs.logits + 0.02 * torch.randn(outputs.logits.shape)
            return outputs

    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    found = compare(MODEL, Noisy(proto), batch(), path)
    assert found.logits.sqnr < found.logits.least
    assert found.logits.alone > 100
    with pytest.raises(ExportError, match="the file does not compute"):
        compare(MODEL, Noisy(proto), batch())


def test_openvino_quantizers_are_judged_alone_too(tmp_path):
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "m.xml"
    openvino.save_model(openvino_model(marked(exported(MODEL, SIZE))), path, compress_to_fp16=False)
    given = {name: each[:1] for name, each in images(2).items()}
    found = inside(MODEL, path, given)
    assert len(found.layers) == 5  # of six inputs, as both heads read one
    assert all(each.moved == 0 for each in found.layers)
    with torch.no_grad():
        wanted = MODEL(**given)
    assert sqnr(wanted.logits, torch.from_numpy(found.outputs["logits"])) > 100


def test_a_wrong_output_fails_without_a_file_to_look_into(proto):
    wrong = changed(proto, "classes.weight_quantizer.codes", one_channel)
    with pytest.raises(ExportError, match="the file does not compute what the model computes"):
        compare(MODEL, File(wrong), batch())


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, x) == BEST
    assert sqnr(x, x + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)  # 10 log10(25 / 0.25)
    assert sqnr(x, torch.zeros(2)) == pytest.approx(0.0)


def test_of_equal_scores_the_lower_index_comes_first():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    with LowerIndexFirst():
        values, places = torch.topk(scores, 3, dim=1)
        assert scores.topk(2, dim=1).indices.tolist() == [[1, 2]]
    assert places.tolist() == [[1, 2, 4]]
    assert values.tolist() == [[2.0, 2.0, 2.0]]


def test_the_noise_of_whole_biases_is_what_integer_convolutions_do():
    """A convolution whose bias falls between two steps of its products gives what the next one gives."""
    model = toy(8)
    layer = model.stem
    step = layer.input_quantizer.grid().step * layer.weight_quantizer.grid().step
    with torch.no_grad():
        layer.bias.copy_(step * (torch.arange(len(step)) + 0.4))
    given = images(1)["pixel_values"]
    seen = {}
    with torch.no_grad():
        exact = layer(given)
        with rounding_noise(model, whole_biases=True):
            layer.register_forward_hook(lambda _, args, y: seen.update(y=y))
            model(given)
    moved = (exact - seen["y"]).mean((0, 2, 3)) / step
    torch.testing.assert_close(moved, torch.full_like(moved, 0.4), rtol=0, atol=0.05)


def shown(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 64, 96, generator=generator)
    return {"pixel_values": pixels, "pixel_mask": torch.ones(count, 64, 96, dtype=torch.int64)}


def sparse(bias: float) -> Toy:
    """A model whose `deep` adds nothing up at 4 bits, and is read at 8: a step of its products is many codes.

    `bias` is in steps of the products.
    """
    torch.manual_seed(0)
    model = Toy(4)
    model.up = QuantConvTranspose2d.from_float(
        nn.ConvTranspose2d(6, WIDTH, 2, stride=2, groups=2),
        weight=number_format("weight", 4),
        input=number_format("input", 8),
    )
    with torch.no_grad():
        model.deep.weight.zero_()[:, 0, 1, 1] = 1.0
        model.deep.bias.zero_()
    for path, each in quantizers(model).items():
        each.path = path
    layer = calibrated(model).deep
    with torch.no_grad():
        layer.bias += bias * layer.input_quantizer.grid().step * layer.weight_quantizer.grid().step
    return model


def judged(model: Toy, file_of: Toy, tmp_path: Path) -> LayerParity:
    """What reads the convolution, in the file of another model."""
    path = tmp_path / "model.onnx"
    onnx.save(prepared(with_pairs(marked(exported(file_of, SIZE)))), path)
    first = {name: each[:1] for name, each in images(2).items()}
    return next(each for each in inside(model, path, first).layers if each.path == "up.input_quantizer")


def test_a_layer_may_move_as_many_codes_as_whole_biases_do(tmp_path):
    between = sparse(1 / 18)  # no whole number of steps, nor of any part that codes times 2 to 9 allow
    found = judged(between, between, tmp_path)
    assert found.moved > 0.02
    assert found.holds


def test_a_layer_may_not_move_so_many_where_its_bias_is_whole(tmp_path):
    found = judged(sparse(0.0), sparse(1 / 9), tmp_path)
    assert found.moved > 0.02
    assert found.furthest < 1.5
    assert not found.holds


@pytest.mark.parametrize("portable", PORTABLE)
def test_codes_that_are_only_there_in_bands_are_judged_too(portable, tmp_path, monkeypatch):
    """As in large images: shortcut and sum of a residual block are made band by band, and never joined."""
    monkeypatch.setattr(bands, "_CACHE", 2_000)
    block = {"layer_type": "bottleneck", "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 1]}
    backbone = {**tiny_config("detr")["backbone_config"], **block, "out_features": ["stage2"]}
    model = load_config_model(tiny_config("detr") | {"backbone_config": backbone}, None).model.eval()
    facts = trace(model, family_of(model), (64, 96))
    rewrite(model, make_plan(load_recipe("w8a8"), facts), facts)
    set_ranges(model, lambda: model(**shown(2)))
    path = tmp_path / "banded.onnx"
    graph = with_pairs(marked(exported(model, (64, 96), batch=1)))
    onnx.save(prepared(graph, portable=portable), path)
    banded = {key for key, each in OnnxProbe(path).found.items() if len(each.names) > 1}
    block_of = "model.backbone.model.encoder.stages.0.layers"
    assert {f"{block_of}.0.shortcut.output_quantizer", f"{block_of}.0.activation.output_quantizer"} <= banded
    found = inside(model, path, shown(1)).layers
    assert all(each.holds for each in found)
    assert all(each.moved is not None for each in found if each.path in banded)


def test_codes_of_heads_are_seen_behind_their_own_limits(tmp_path):
    """4 bits of bytes for each of two heads: what leaves a head's range shows its last code."""
    zeros = [numpy_helper.from_array(np.array([128, 128], np.uint8), "zero")]
    bounds = {"Max": np.array([[[122]], [[121]]], np.uint8), "Min": np.array([[[137]], [[136]]], np.uint8)}
    limits = [numpy_helper.from_array(value, key) for key, value in bounds.items()]
    step = numpy_helper.from_array(np.array([0.5, 2.0], np.float32), "step")
    name = "attention.v_quantizer"
    nodes = [
        onnx.helper.make_node(
            "QuantizeLinear", ["x", "step", "zero"], ["codes"], name=f"{name}.quantize", axis=1
        ),
        onnx.helper.make_node("Max", ["codes", "Max"], ["above"], name=f"{name}.max"),
        onnx.helper.make_node("Min", ["above", "Min"], ["within"], name=f"{name}.min"),
        onnx.helper.make_node("DequantizeLinear", ["within", "step", "zero"], ["y"], name="back", axis=1),
    ]
    shape = [1, 2, 1, 3]
    ends = [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, shape) for each in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "heads", ends[:1], ends[1:], [*zeros, *limits, step])
    path = tmp_path / "heads.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), path)
    given = {"x": torch.tensor([[[[-40.0, 1.0, 40.0]], [[-40.0, 1.9, 40.0]]]])}
    inside = np.array([[[[-3.0, 1.0, 4.5]], [[-14.0, 2.0, 16.0]]]], np.float32)
    probe = OnnxProbe(path)
    assert np.array_equal(probe.values(given)[name], inside)
    after = probe.values_after(given, {name: inside[..., ::-1].copy()})
    assert np.array_equal(after[name], inside)
    assert np.array_equal(after["y"], inside[..., ::-1])


@pytest.mark.parametrize("portable", PORTABLE)
def test_attention_of_few_bits_is_judged_where_its_values_leave_their_range(portable, tmp_path):
    model = ready("conditional_detr").model.eval()
    path = tmp_path / "attention.onnx"
    onnx.save(prepared(with_pairs(marked(exported(model, FAMILY_SIZE, batch=1))), portable=portable), path)
    strange = {
        **inputs("pixels", 1, FAMILY_SIZE),
        "pixel_mask": torch.ones(1, *FAMILY_SIZE, dtype=torch.int64),
    }
    strange["pixel_values"] = 4 * strange["pixel_values"]
    found = [each for each in inside(model, path, strange).layers if each.path.endswith("attn.v_quantizer")]
    assert len(found) == 5, (
        "two of the encoder, four of the decoder less the first, whose queries are constant"
    )
    assert all(each.moved is not None and each.holds for each in found)


def test_what_follows_a_band_gets_its_true_codes(tmp_path):
    """A quantizer in two bands, by hand: what reads the second band sees what was set there."""
    grid = [numpy_helper.from_array(np.float32(0.5), "step"), numpy_helper.from_array(np.uint8(3), "zero")]
    rows = numpy_helper.from_array(np.array([1, 2]), "rows")
    nodes = [onnx.helper.make_node("Split", ["x", "rows"], ["x0", "x1"], axis=1)]
    for part in "01":
        own = ["step", "zero"]
        name = f"a.input_quantizer.{part}"
        nodes += [
            onnx.helper.make_node(
                "QuantizeLinear", [f"x{part}", *own], [f"q{part}"], name=f"{name}.quantize"
            ),
            onnx.helper.make_node("DequantizeLinear", [f"q{part}", *own], [f"y{part}"], name=f"{name}.back"),
        ]
    kind = onnx.TensorProto.FLOAT
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, kind, [1, size, 2])] for name, size in (("x", 3), ("y1", 2))
    )
    graph = onnx.helper.make_graph(nodes, "banded", inputs, outputs, [*grid, rows])
    path = tmp_path / "banded.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), path)
    given = {"x": torch.tensor([[[0.0, 0.5], [1.0, 1.5], [2.0, 2.6]]])}
    probe = OnnxProbe(path)
    before = probe.values(given)
    assert before["a.input_quantizer"].tolist() == [[[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]]
    set_ = before["a.input_quantizer"] + np.float32(1)
    after = probe.values_after(given, {"a.input_quantizer": set_})
    assert after["a.input_quantizer"].tolist() == before["a.input_quantizer"].tolist()
    assert after["y1"].tolist() == [[[2.0, 2.5], [3.0, 3.5]]]
