"""A detector as a program and as plain ONNX: to the last bit, and clear about what cannot be exported."""

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from exported_models import HEADS, SIZE, Toy, asymmetric, images, run_plain, toy
from family_models import facts_of
from onnx import numpy_helper
from torch import Tensor

from qdetr_cli.errors import ExportError
from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.program import exported
from qdetr_cli.fake_quant import Grid
from qdetr_cli.quantizers import LSQ
from qdetr_cli.rewrite import quantizers, set_enabled

ENABLED_BITS = [(2, False), (2, True), (4, False), (7, True), (8, False)]  # and whether weights are mid-rise


def plain(model: Toy, batch: int | None = 1) -> onnx.ModelProto:
    return with_pairs(marked(exported(model, SIZE, batch=batch)))


@pytest.fixture(scope="module", params=ENABLED_BITS, ids=lambda p: f"{p[0]} bits{', mid-rise' * p[1]}")
def case(request) -> tuple[Toy, onnx.ModelProto]:
    bits, mid_rise = request.param
    model = toy(bits, mid_rise=mid_rise)
    return model, plain(model, None)


def test_the_program_is_the_fake_quant_model_to_the_last_bit():
    model, given = toy(3), images(1)
    program = exported(model, SIZE)
    with torch.no_grad():
        wanted = model(**given)
        logits, boxes = program.exported.module()(pixel_values=given["pixel_values"])
    assert torch.equal(logits, wanted.logits)
    assert torch.equal(boxes, wanted.pred_boxes)
    assert program.inputs == ("pixel_values",)  # nothing depends on the mask
    assert program.roundings.keys() == quantizers(model).keys()


@pytest.mark.parametrize("count", [1, 3], ids=["1 image", "3 images"])
def test_onnx_runtime_computes_the_same_for_any_number_of_images(case, count):
    model, proto = case
    onnx.checker.check_model(proto, full_check=True)
    with torch.no_grad():
        wanted = model(**images(count))
    logits, boxes = run_plain(proto, images(count))
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(boxes, wanted.pred_boxes, rtol=1e-6, atol=1e-6)


def test_weights_are_stored_as_the_codes_of_their_quantizer_and_nothing_else(case):
    model, proto = case
    stored = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    layers = {path.rpartition(".")[0]: each for path, each in quantizers(model).items() if "weight" in path}
    for path, quantizer in layers.items():
        weight = model.get_submodule(path).weight
        codes = stored[f"{path}.weight_quantizer.codes"]
        assert codes.dtype == np.int8
        integers = quantizer.integers(weight).numpy()
        assert np.array_equal(codes, 2 * integers + 1 if quantizer.format.mid_rise else integers)
    widest = max(each.weight.numel() for each in (model.deep, model.tokens))
    assert not any(array.dtype == np.float32 and array.size >= widest for array in stored.values())


def test_activations_are_uint8_and_coarse_grids_are_kept_by_a_clip_of_codes(case):
    model, proto = case
    stored = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    for path, quantizer in quantizers(model).items():
        if path.endswith("weight_quantizer"):
            continue
        zero = stored[nodes[f"{path}.quantize"].input[2]]
        expected = quantizer.zero_point() - quantizer.format.qmin
        assert zero.dtype == np.uint8
        assert zero.reshape(-1).tolist() == expected.tolist()
        clip = nodes.get(f"{path}.clip")
        assert (clip is None) == (quantizer.format.bits == 8)
        if clip is not None:
            levels = 2**quantizer.format.bits
            assert [int(stored[name]) for name in clip.input[1:]] == [0, levels - 1]


def test_learned_offsets_are_rounded_as_the_grid_rounds_them():
    model = toy(4)
    with torch.no_grad():
        for each in asymmetric(model):
            each.offset += 0.37  # no whole number any more
        wanted = model(**images(1)).logits
    torch.testing.assert_close(run_plain(plain(model), images(1))[0], wanted, rtol=1e-6, atol=1e-6)


def test_quantizers_that_are_off_leave_the_float_model():
    model = toy(4)
    set_enabled(model, None, False)
    program = exported(model, SIZE)
    assert not program.roundings
    with torch.no_grad():
        wanted = model(**images(1)).logits
    found, _ = run_plain(with_pairs(marked(program)), images(1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_statistics_quantizer_is_exported_with_the_step_of_the_weight_it_has():
    model = toy(3, quantizer="statistics")
    with torch.no_grad():
        model.tokens.weight.mul_(3)
        wanted = model(**images(1)).logits
        model.tokens.weight_quantizer.step.fill_(9)  # what another weight left behind
    torch.testing.assert_close(run_plain(plain(model), images(1))[0], wanted, rtol=1e-6, atol=1e-6)


class PowersOfTwo(LSQ):
    def live_step(self) -> Tensor:
        return self.step.log2().round().exp2()


class LastSeen(LSQ):
    def grid_for(self, x: Tensor) -> Grid:
        return Grid(step=x.abs().amax().reshape(1) / 7, zero=None, qmin=-8, qmax=7, shifted=False)


def test_a_users_quantizer_is_exported_with_the_grid_it_gives():
    model = toy(4)
    model.tokens.input_quantizer.__class__ = PowersOfTwo
    with torch.no_grad():
        wanted = model(**images(1)).logits
    program = exported(model, SIZE)
    step = program.roundings["tokens.input_quantizer"].grid.step
    assert torch.equal(step.log2(), step.log2().round())
    torch.testing.assert_close(
        run_plain(with_pairs(marked(program)), images(1))[0], wanted, rtol=1e-6, atol=1e-6
    )


def test_a_users_quantizer_whose_step_depends_on_the_image_is_refused_by_name():
    model = toy(4)
    model.tokens.input_quantizer.__class__ = LastSeen
    with pytest.raises(
        ExportError, match=r"quantizer tokens\.input_quantizer: its step depends on the image"
    ):
        exported(model, SIZE)


def test_a_free_offset_is_refused_by_name():
    model = toy(4)
    quantizer = model.classes.input_quantizer
    quantizer.format = replace(quantizer.format, quantizer_options={"free_offset": True})
    with pytest.raises(ExportError, match=r"classes\.input_quantizer: the option free_offset"):
        exported(model, SIZE)


def test_a_model_that_cannot_be_followed_is_an_error_that_says_so():
    class Stubborn(Toy):
        def forward(self, pixel_values, pixel_mask=None):
            return super().forward(pixel_values * float(pixel_values.sum() > 0))

    torch.manual_seed(0)
    model = Stubborn()
    set_enabled(model, None, False)
    with pytest.raises(ExportError, match=r"cannot follow the model at 12x8 pixels: .*; try another --size"):
        exported(model, SIZE)


@pytest.mark.parametrize(("name", "free"), [("yolos", True), ("rt_detr", False)])
def test_any_size_is_exported_exactly_or_refused(name, free):
    """RT-DETR's code makes Python numbers of the sizes of its maps: its file would compute nonsense."""
    model = facts_of(name)[0].eval()
    if not free:
        with pytest.raises(ExportError, match="--size any: the code of this model makes constants"):
            exported(model, (96, 160), any_size=True)
        return
    program = exported(model, (96, 160), any_size=True)
    assert program.size is None
    for size in ((96, 160), (128, 96), (97, 131)):
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(program.exported.module()(pixel_values=pixels)[0], model(pixels).logits)


def test_the_model_is_left_as_it_was():
    model = toy(4).train()
    before = copy.deepcopy(model.state_dict())
    exported(model, SIZE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_steps_per_head_stand_on_the_axis_of_heads():
    program = exported(toy(4), SIZE)
    rounding = program.roundings["probs_quantizer"]
    assert rounding.axis == 1
    assert rounding.grid.step.shape == (HEADS,)
    assert (rounding.grid.qmin, rounding.grid.qmax) == (0, 15)


@pytest.mark.parametrize(
    ("name", "read"), [("detr", ("pixel_values", "pixel_mask")), ("rt_detr", ("pixel_values",))]
)
def test_a_model_is_exported_once_whether_it_reads_its_mask_or_not(name, read, monkeypatch):
    model = facts_of(name)[0].eval()
    made, own = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **more: made.append(1) or own(*args, **more))
    assert exported(model, (64, 96)).inputs == read
    assert made == [1]
