"""Quantized Linear and Conv2d: the reference is the float layer with the dequantized weight and input."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdetr_cli.errors import RecipeError
from qdetr_cli.layers import QuantConv2d, QuantLinear
from qdetr_cli.recipe import QuantFormat

WEIGHT = QuantFormat(bits=4, symmetric=True, unsigned=False, per="channel", quantizer="lsq", init="mse")
INPUT = QuantFormat(bits=4, symmetric=False, unsigned=False, per="tensor", quantizer="lsq", init="mse")


def calibrated(layer: QuantLinear | QuantConv2d, x: Tensor) -> QuantLinear | QuantConv2d:
    layer.calibrate_weight()
    if layer.input_quantizer is not None:
        layer.input_quantizer.start_observing()
        layer.input_quantizer.observe(x)
        layer.input_quantizer.finish_observing()
    return layer


def linear() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(12, 6), torch.randn(3, 5, 12)


CONVS = {
    "plain": {},
    "stride-and-zeros": {"stride": 2, "padding": 1},
    "groups-no-bias": {"groups": 4, "bias": False},
    "dilation-same": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (0, 2), "padding_mode": "replicate"},
}


def conv(options: dict) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 3, **options), torch.randn(2, 8, 9, 7)


@pytest.mark.parametrize(
    "weight", [None, WEIGHT, replace(WEIGHT, per="tensor")], ids=["float", "channel", "tensor"]
)
@pytest.mark.parametrize("input", [None, INPUT], ids=["float-input", "input"])
def test_linear_computes_with_the_numbers_of_the_grid(weight, input):
    module, x = linear()
    layer = calibrated(QuantLinear.from_float(module, weight=weight, input=input), x)
    qw, qx = layer.weight_quantizer, layer.input_quantizer
    w = module.weight if qw is None else qw.dequantize(qw.integers(module.weight))
    x_hat = x if qx is None else qx.dequantize(qx.integers(x))
    assert torch.equal(layer(x), F.linear(x_hat, w, module.bias))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
def test_conv_computes_with_the_numbers_of_the_grid(options):
    module, x = conv(options)
    layer = calibrated(QuantConv2d.from_float(module, weight=WEIGHT, input=INPUT), x)
    reference = copy.deepcopy(module)
    with torch.no_grad():
        qw, qx = layer.weight_quantizer, layer.input_quantizer
        reference.weight.copy_(qw.dequantize(qw.integers(module.weight)))
        assert torch.equal(layer(x), reference(qx.dequantize(qx.integers(x))))
        assert not torch.equal(layer(x), module(x))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
def test_switched_off_it_is_the_float_layer(options):
    module, x = conv(options)
    layer = QuantConv2d.from_float(module, weight=WEIGHT, input=INPUT)
    layer.weight_quantizer.enabled = layer.input_quantizer.enabled = False
    assert torch.equal(layer(x), module(x))


def test_parameters_are_shared_and_the_module_is_left_alone():
    module, _ = linear()
    module.weight.requires_grad_(False)
    layer = QuantLinear.from_float(module.eval(), weight=WEIGHT, input=INPUT)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert not layer.training
    assert not layer.input_quantizer.training
    assert sorted(module.state_dict()) == ["bias", "weight"]
    assert sorted(layer.state_dict()) == sorted(
        ["bias", "weight"]
        + [f"input_quantizer.{name}" for name in ("calibrated", "offset", "step")]
        + [f"weight_quantizer.{name}" for name in ("calibrated", "step")]
    )


def test_hooks_come_along():
    module, x = linear()
    module.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(QuantLinear.from_float(module, weight=None, input=None)(x), torch.zeros(1))


def test_gradients_reach_everything():
    module, x = linear()
    layer = calibrated(QuantLinear.from_float(module, weight=WEIGHT, input=INPUT), x)
    layer(x.requires_grad_()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*layer.parameters(), x))


def test_weight_gradient_is_the_float_gradient_inside_the_grid():
    module, x = linear()
    layer = calibrated(QuantLinear.from_float(module, weight=replace(WEIGHT, init="minmax"), input=None), x)
    layer(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.flatten(0, 1).sum(0).expand(6, -1))


@pytest.mark.parametrize("per", ["channel", "head"])
def test_an_input_step_per_channel_or_head_is_refused(per):
    with pytest.raises(RecipeError, match=f"input: per: {per} cannot be deployed here; valid: tensor"):
        QuantLinear.from_float(linear()[0], weight=None, input=replace(INPUT, per=per))


def test_weight_formats_without_an_integer_kernel_are_refused():
    for bad in (
        replace(WEIGHT, symmetric=False),
        replace(WEIGHT, unsigned=True),
        replace(WEIGHT, per="head"),
    ):
        with pytest.raises(RecipeError, match="weight: "):
            QuantLinear.from_float(linear()[0], weight=bad, input=None)


def test_a_subclass_with_its_own_arithmetic_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input / 2)

    with pytest.raises(RecipeError, match=r"Standardised computes something else than Conv2d.*keep: float"):
        QuantConv2d.from_float(Standardised(1, 1, 1), weight=WEIGHT, input=None)


def test_deepcopy_trains_on_its_own():
    module, x = linear()
    layer = calibrated(QuantLinear.from_float(module, weight=WEIGHT, input=INPUT), x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    nn.init.constant_(twin.weight_quantizer.step, 1.0)
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_export_gives_the_same_numbers(kind):
    module, x = linear() if kind == "linear" else conv(CONVS["stride-and-zeros"])
    layer_class = QuantLinear if kind == "linear" else QuantConv2d
    layer = calibrated(layer_class.from_float(module, weight=WEIGHT, input=INPUT), x).eval()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    other = torch.cat((x, x * 2))
    assert torch.equal(program.module()(other), layer(other))


def test_autocast_runs_the_product_in_half_precision():
    module, x = linear()
    layer = calibrated(QuantLinear.from_float(module, weight=WEIGHT, input=INPUT), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    assert layer.weight_quantizer.step.grad.isfinite().all()
