"""Linear and convolutions that quantize weight and input, sharing the parameters of what they replace."""

from typing import Self, cast

from torch import Tensor, nn
from torch.nn import functional as F

from qdetr_cli.errors import RecipeError
from qdetr_cli.quantizers import FakeQuantizer, make_quantizer
from qdetr_cli.recipe import QuantFormat
from qdetr_cli.recomputed import recomputed

FLOAT: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Quantized(nn.Module):
    """Mixed into a layer of torch: its weight and its input pass a quantizer, where there is one."""

    weight: Tensor
    weight_quantizer: FakeQuantizer | None
    input_quantizer: FakeQuantizer | None

    @classmethod
    def from_float(cls, module: nn.Module, *, weight: QuantFormat | None, input: QuantFormat | None) -> Self:
        """Return the quantized layer of a float one: the same Parameters, not copies. None leaves a slot
        float.

        Raises RecipeError for a format that an integer kernel cannot use, and for a layer that computes
        something else than the torch layer that this class is.
        """
        base = next(each for each in FLOAT if issubclass(cls, each))
        _check_same_arithmetic(base, module)
        layer = cls.__new__(cls)
        for name, value in vars(module).items():
            layer.__dict__[name] = value.copy() if isinstance(value, dict) else value
        axis = 1 if base is nn.ConvTranspose2d else 0  # of the output channels
        layer.weight_quantizer = None if weight is None else _weight_quantizer(weight, layer.weight, axis)
        layer.input_quantizer = None if input is None else _input_quantizer(input, layer.weight)
        return layer.train(module.training)

    def calibrate_weight(self) -> None:
        """Set the weight's steps from the weight itself."""
        if self.weight_quantizer is not None:
            self.weight_quantizer.start_observing()
            self.weight_quantizer.observe(self.weight)
            self.weight_quantizer.finish_observing()

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the weight on their grids."""
        return _quantized(self.input_quantizer, x), _quantized(self.weight_quantizer, self.weight)


class QuantLinear(Quantized, nn.Linear):
    """nn.Linear on quantized weight (D_out, D_in) and input (.., D_in)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (.., D_out)."""
        x, weight = self.operands(input)
        with recomputed():
            return F.linear(x, weight, self.bias)


class QuantConv2d(Quantized, nn.Conv2d):
    """nn.Conv2d on quantized weight (D_out, D_in / groups, h, w) and input (B, D_in, H, W).

    Padding comes after quantization: zeros are exact, since 0 lies on a deployable grid.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, D_out, H', W')."""
        x, weight = self.operands(input)
        with recomputed():
            y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


class QuantConvTranspose2d(Quantized, nn.ConvTranspose2d):
    """nn.ConvTranspose2d on quantized weight (D_in, D_out / groups, h, w) and input (B, D_in, H, W)."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return (B, D_out, H', W')."""
        if output_size is not None:
            raise RecipeError("a transposed convolution that is given its output size stays float")
        padding = cast(tuple[int, ...], self.padding)  # torch refuses names here
        options = (self.stride, padding, self.output_padding, self.groups, self.dilation)
        x, weight = self.operands(input)
        with recomputed():
            return F.conv_transpose2d(x, weight, self.bias, *options)


def quantized_layer(module: nn.Module, *, weight: QuantFormat | None, input: QuantFormat | None) -> Quantized:
    """Return what stands for a Linear, Conv2d or ConvTranspose2d; see `Quantized.from_float`."""
    kinds: tuple[type[Quantized], ...] = (QuantLinear, QuantConv2d, QuantConvTranspose2d)
    chosen = next(kind for kind, base in zip(kinds, FLOAT, strict=True) if isinstance(module, base))
    return chosen.from_float(module, weight=weight, input=input)


def _quantized(quantizer: FakeQuantizer | None, x: Tensor) -> Tensor:
    if quantizer is None:
        return x
    y: Tensor = quantizer(x)
    return y


def _check_same_arithmetic(base: type[nn.Module], module: nn.Module) -> None:
    """Refuse a subclass with a forward of its own (weight standardisation): it would be lost in silence."""
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(base, name, None):
            raise RecipeError(
                f"{type(module).__name__} computes something else than {base.__name__}, so it stays float; "
                "keep it in float with a rule such as {path: [its.module.path], keep: float}"
            )


def _weight_quantizer(format: QuantFormat, weight: Tensor, axis: int) -> FakeQuantizer:
    if not format.symmetric or format.unsigned:
        raise RecipeError("weight: an integer kernel needs symmetric: true, unsigned: false")
    if format.per == "channel":
        channels = weight.shape[axis]
        return make_quantizer(format, axis=axis, channels=channels, batched=False).to(weight.device)
    _check_per_tensor(format, "weight", "tensor, channel")
    return make_quantizer(format, axis=None, channels=1, batched=False).to(weight.device)


def _input_quantizer(format: QuantFormat, weight: Tensor) -> FakeQuantizer:
    _check_per_tensor(format, "input", "tensor")
    return make_quantizer(format, axis=None, channels=1).to(weight.device)


def _check_per_tensor(format: QuantFormat, slot: str, valid: str) -> None:
    if format.per != "tensor":
        raise RecipeError(f"{slot}: per: {format.per} cannot be deployed here; valid: {valid}")
