"""The pass for ONNX Runtime: the values of the plain graph, on the kernels that it promises.

The reference is the plain graph node by node, in real numbers, without any optimization.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
from processors_without_vnni import PORTABLE
from quantized_graphs import Drawing, kernels_of, run

from qdetr_cli.export.ort import bands
from qdetr_cli.export.ort.prepare import prepared
from qdetr_cli.export.ort.profile import kernels

FLOAT = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"}
STEP = 0.05  # of the last quantizer of a drawing


@pytest.fixture(params=PORTABLE)
def prepare(request) -> Callable[..., onnx.ModelProto]:
    return partial(prepared, portable=request.param)


def chain(drawing: Drawing, zero: int = 0, bits: int = 8, **options) -> str:
    """conv, ReLU, conv, quantizer: the first has a quantized result."""
    x = drawing.rounded("x", 0.02, 128)
    x = drawing.node("Relu", drawing.conv(x, (8, 16, 3, 3), bits=bits, **options))
    x = drawing.conv(drawing.rounded(x, 2.0 / 2**bits, zero, bits), (8, 8, 1, 1), bits=bits, bias=False)
    return drawing.rounded(x, STEP, 100)


def residual(drawing: Drawing) -> str:
    """A bottleneck whose sum is real."""
    x = drawing.node("Relu", "x")
    y = drawing.node("Relu", drawing.conv(drawing.rounded(x, 0.02), (8, 16, 1, 1), bias=False))
    y = drawing.node("Relu", drawing.conv(drawing.rounded(y, 0.02), (8, 8, 3, 3), bias=False))
    y = drawing.conv(drawing.rounded(y, 0.02), (16, 8, 1, 1))
    z = drawing.conv(drawing.rounded(x, 0.03), (16, 16, 1, 1), bias=False)
    y = drawing.node("Relu", drawing.node("Add", y, z))
    return drawing.conv(drawing.rounded(y, 0.02), (8, 16, 1, 1), strides=[2, 2])


def quantized_sum(drawing: Drawing) -> str:
    """The same with codes on both sides of the sum."""
    x = drawing.rounded("x", 0.02, 128)
    y = drawing.rounded(drawing.conv(x, (16, 16, 3, 3), bias=False), 0.0311, 120)
    z = drawing.rounded(drawing.conv(x, (16, 16, 1, 1), bias=False), 0.0273, 130)
    y = drawing.rounded(drawing.node("Relu", drawing.node("Add", y, z)), 0.02)
    return drawing.conv(y, (8, 16, 1, 1))


def stem(drawing: Drawing) -> str:
    """A first convolution of few channels and stride 2, and a pooling."""
    x = drawing.conv(drawing.rounded("x", 0.02, 117), (8, 3, 7, 7), bias=False, strides=[2, 2])
    x = drawing.node("MaxPool", drawing.node("Relu", x), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    return drawing.conv(drawing.rounded(x, 0.02), (8, 8, 3, 3), strides=[2, 2])


def pyramid(drawing: Drawing) -> str:
    """Real results, SiLU, nearest neighbours, a concatenation, two branches with own grids, tokens."""
    x = drawing.conv(drawing.rounded("x", 0.02, 128), (8, 16, 3, 3), pads=[2] * 4, dilations=[2, 2])
    x = drawing.node("Mul", x, drawing.node("Sigmoid", x))
    factor = drawing.constant(np.array([1, 1, 2, 2], np.float32))
    large = drawing.node("Resize", x, "", factor, mode="nearest", **NEAREST["repeated"])
    large = drawing.node("AveragePool", large, kernel_shape=[2, 2], strides=[2, 2])
    x = drawing.node("Concat", x, large, axis=1)
    y = drawing.conv(drawing.rounded(x, 0.02, 90), (8, 16, 3, 3))
    z = drawing.conv(drawing.rounded(x, 0.03, 100), (8, 16, 1, 1))
    x = drawing.node("Add", y, z)
    x = drawing.node("Reshape", x, drawing.constant(np.array([0, 8, -1])))
    x = drawing.node("Transpose", x, perm=[0, 2, 1])
    return drawing.linear(drawing.rounded(x, 0.02, 128), 8, 5)


def grouped(drawing: Drawing) -> str:
    """A convolution of each channel alone, then an affine map of one gain, as HGNetV2 has it."""
    x = drawing.rounded("x", 0.02, 128)
    x = drawing.node("Relu", drawing.conv(x, (16, 1, 5, 5), bias=False, group=16))
    x = drawing.node("Mul", x, drawing.constant(np.float32(0.7)))
    x = drawing.node("Add", x, drawing.constant(np.float32(-0.13)))
    return drawing.conv(drawing.rounded(x, 0.02, 31), (8, 16, 1, 1))


def two_grids(drawing: Drawing) -> str:
    """A grouped convolution that two quantizers read."""
    x = drawing.node(
        "Relu", drawing.conv(drawing.rounded("x", 0.02, 128), (16, 8, 3, 3), bias=False, group=2)
    )
    y = drawing.conv(drawing.rounded(x, 0.02), (8, 16, 1, 1))
    return drawing.node("Add", y, drawing.conv(drawing.rounded(x, 0.03, 7), (8, 16, 1, 1)))


NEAREST = {
    "repeated": {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "shifted": {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"},
}

CONVOLUTIONS: dict[str, tuple[Callable[[Drawing], str], list, dict[str, int]]] = {
    "chain": (chain, [1, 16, 9, 7], {"QLinearConv": 2}),
    "residual": (residual, [1, 16, 8, 8], {"QLinearConv": 2, "MatMulIntegerToFloat": 3}),
    "quantized sum": (
        quantized_sum,
        [1, 16, 8, 8],
        {"QLinearConv": 2, "QLinearAdd": 1, "MatMulIntegerToFloat": 1},
    ),
    "stem": (stem, [1, 3, 33, 46], {"QLinearConv": 1, "NhwcMaxPool": 1, "MatMulIntegerToFloat": 1}),
    "pyramid": (pyramid, [1, 16, 6, 8], {"MatMulIntegerToFloat": 4, "QuickGelu": 1}),
    "grouped": (grouped, [1, 16, 8, 8], {"QLinearConv": 1, "MatMulIntegerToFloat": 1}),
    "two grids": (two_grids, [1, 16, 8, 8], {"QLinearConv": 2, "MatMulIntegerToFloat": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_run_on_integers_with_the_same_values(prepare, name, tmp_path):
    draw, shape, wanted = CONVOLUTIONS[name]
    drawing = Drawing(shape)
    plain = drawing.model(draw(drawing))
    model = prepare(plain)
    onnx.checker.check_model(model, full_check=True)
    assert_near(model, plain, drawing.images())
    found = Counter(kernels_of(model, tmp_path))
    assert not FLOAT & set(found)
    assert {op: found[op] for op in wanted} == wanted
    assert found["Transpose"] <= 3  # at the ends


@pytest.mark.parametrize("zero", [0, 1], ids=lambda zero: f"zero {zero}")
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8], ids=lambda bits: f"{bits} bits")
def test_a_grid_of_few_codes_stays_that_grid(prepare, bits, zero, tmp_path):
    drawing = Drawing([2, 16, 12, 10])
    plain = drawing.model(chain(drawing, zero, bits, bias=False))
    model = prepare(plain)
    assert_near(model, plain, drawing.images())
    assert not FLOAT & set(kernels_of(model, tmp_path))


@pytest.mark.parametrize("bits", [2, 4, 6], ids=lambda bits: f"{bits} bits")
def test_weights_of_few_bits_leave_room_for_the_bias(prepare, bits):
    drawing = Drawing([1, 16, 40, 40])
    plain = drawing.model(chain(drawing, 0, bits))
    assert_near(prepare(plain), plain, drawing.images(), moved=0.003)


def test_bands_of_large_images_change_nothing(prepare, monkeypatch, tmp_path):
    drawing = Drawing([1, 16, 12, 8])
    plain, given = drawing.model(residual(drawing)), drawing.images()
    whole = prepare(plain)
    monkeypatch.setattr(bands, "_CACHE", 4 * 16 * 8 * 5)  # five rows of 16 channels
    banded = prepare(plain)
    assert np.array_equal(run(banded, given, optimized=True)[0], run(whole, given, optimized=True)[0])
    found = Counter(kernels_of(banded, tmp_path))
    assert found["Add"] == 3
    assert found["MatMulIntegerToFloat"] >= 4
    assert found["Split"] <= 3
    onnx.save(banded, tmp_path / "banded.onnx")
    assert kernels(tmp_path / "banded.onnx").count("convolution") == (5, 5)


@pytest.mark.parametrize("flat", [False, True], ids=["tokens", "rows"])
def test_linears_keep_their_real_bias(prepare, flat, tmp_path):
    drawing = Drawing([6, 8] if flat else ["batch", 6, 8])
    x = drawing.linear(drawing.rounded("x", 0.02, 120), 8, 16)
    x = drawing.linear(drawing.rounded(drawing.node("Relu", x), 0.02), 16, 5)
    plain = drawing.model(x)
    model = prepare(plain)
    assert_near(model, plain, drawing.images(3), rtol=1e-5)
    assert Counter(kernels_of(model, tmp_path))["MatMulIntegerToFloat"] == 2


def attention(drawing: Drawing, zeros: list[int], probs_zeros: list[int], bits: int) -> str:
    """softmax(q k / 4) v of two heads, of one input."""
    steps, heads = np.array([0.02, 0.03]) * 2.0 ** (8 - bits), "x"
    q = drawing.by_head(heads, steps, zeros, bits)
    turned = drawing.node("Transpose", heads, perm=[0, 1, 3, 2])
    k = drawing.by_head(turned, steps, zeros[::-1], bits)
    scores = drawing.node("MatMul", q, k, name="node_scores")
    scores = drawing.node("Mul", scores, drawing.constant(np.float32(0.25)))
    probs = drawing.by_head(drawing.node("Softmax", scores), np.array([1, 0.5]) / 2**bits, probs_zeros, bits)
    v = drawing.by_head(heads, steps, zeros, bits)
    return drawing.node("MatMul", probs, v, name="node_mixed")


@pytest.mark.parametrize("batch", [1, "batch"], ids=["one image", "any batch"])
@pytest.mark.parametrize("probs", [[0, 0], [0, 5]], ids=["probs from 0", "probs with zero points"])
@pytest.mark.parametrize(
    ("zeros", "bits"),
    [([128, 128], 8), ([120, 120], 8), ([100, 141], 8), ([6, 9], 4), ([1, 2], 2)],
    ids=["symmetric", "one zero point", "asymmetric", "4 bits", "2 bits"],
)
def test_products_of_heads_run_on_integers(prepare, zeros, bits, probs, batch, tmp_path):
    drawing = Drawing([batch, 2, 6, 8])
    plain = drawing.model(attention(drawing, zeros, [each % 2**bits for each in probs], bits))
    model = prepare(plain)
    for images in (1, 1) if batch == 1 else (1, 3):
        assert_near(model, plain, drawing.images(images), moved=0.01, rtol=0.05)
    found = Counter(kernels_of(model, tmp_path))
    assert found["MatMulIntegerToFloat"] == 2
    assert not FLOAT & set(found)


def test_batches_of_any_size(prepare, tmp_path):
    for draw, channels in ((residual, 16), (stem, 3), (pyramid, 16)):
        drawing = Drawing(["batch", channels, 16, 16])
        plain = drawing.model(draw(drawing))
        model = prepare(plain)
        for count in (1, 3):
            assert_near(model, plain, drawing.images(count))
        assert not FLOAT & set(kernels_of(model, tmp_path))


def test_the_profile_counts_what_runs_where(prepare, tmp_path):
    drawing = Drawing([1, 16, 8, 8])
    x = drawing.node("Relu", drawing.conv(drawing.rounded("x", 0.02, 128), (16, 8, 3, 3), group=2))
    x = drawing.node("Add", x, drawing.conv(drawing.rounded("x", 0.03, 128), (16, 16, 1, 1)))
    x = drawing.node("Reshape", x, drawing.constant(np.array([0, 16, -1])))
    x = drawing.linear(drawing.rounded(drawing.node("Transpose", x, perm=[0, 2, 1]), 0.02), 16, 8)
    heads = drawing.node("Reshape", x, drawing.constant(np.array([0, 2, -1, 8])))
    turned = drawing.node("Transpose", heads, perm=[0, 1, 3, 2])
    q, k = (drawing.by_head(each, [0.02, 0.03], [128, 128]) for each in (heads, turned))
    scores = drawing.node("MatMul", q, k, name="node_scores")
    model = prepare(drawing.model(drawing.linear(scores, 32, 3)))
    onnx.save(model, tmp_path / "model.onnx")
    found = kernels(tmp_path / "model.onnx")
    assert found.count("convolution") == (1, 2)  # a grouped one whose result is real
    assert found.count("linear") == (1, 2)  # one reads no codes
    assert found.count("product") == (1, 1)
    assert {each.kind for each in found.floats()} == {"convolution", "linear"}


@pytest.mark.parametrize("kind", NEAREST)
def test_nearest_neighbours_are_those_of_the_node(prepare, kind):
    drawing = Drawing([1, 16, 6, 8])
    x = drawing.conv(drawing.rounded("x", 0.02, 128), (8, 16, 1, 1))
    factor = drawing.constant(np.array([1, 1, 3, 2], np.float32))
    plain = drawing.model(drawing.node("Resize", x, "", factor, mode="nearest", **NEAREST[kind]))
    assert_near(prepare(plain), plain, drawing.images(), moved=0)


def test_a_float_model_is_left_alone():
    drawing = Drawing([1, 4, 8, 8])
    plain = drawing.model(drawing.conv("x", (8, 4, 3, 3)))
    assert prepared(plain) == prepared(plain, portable=True) == plain


def test_a_portable_file_has_no_int8_in_a_product():
    """uint8 by uint8 is added in 32 bits by every processor; uint8 by int8 is not."""
    drawing = Drawing([1, 16, 8, 8])
    x = drawing.node("Reshape", quantized_sum(drawing), drawing.constant(np.array([1, 2, -1, 8])))
    heads = drawing.by_head(x, [0.02, 0.03], [128, 128])
    turned = drawing.by_head(drawing.node("Transpose", x, perm=[0, 1, 3, 2]), [0.02, 0.03], [128, 128])
    scores = drawing.node("MatMul", heads, turned, name="node_scores")
    plain = drawing.model(drawing.linear(drawing.rounded(scores, 0.02), 32, 3))
    kinds = {portable: int8_values(prepared(plain, portable=portable)) for portable in (False, True)}
    assert kinds[False]
    assert not kinds[True]


def int8_values(model: onnx.ModelProto) -> set[str]:
    """The constants and the zero points of int8."""
    return {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8}


def assert_near(model, plain, given, moved: float = 0.002, rtol: float = 1e-4) -> None:
    """Equal up to rounding: few values are further away than that, and those by little."""
    got, expected = run(model, given, optimized=True)[0], run(plain, given, optimized=False)[0]
    assert got.shape == expected.shape
    scale = expected.std()
    away = np.abs(got - expected) / scale
    assert np.mean(away > rtol) <= moved, f"{np.mean(away > rtol):.2%} differ, at most by {away.max():.3g}"
