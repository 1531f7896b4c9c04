"""Fake quantization: real values rounded to a grid of 2^bits numbers, with a learned step and offset (LSQ+).

    zero_point    = clip(round(offset), qmin, qmax)
    integers(x)   = clip(round(x / step) + zero_point, qmin, qmax)
    dequantize(q) = (q - zero_point) * step
    forward(x)    = dequantize(integers(x)), to the last bit

So 0 lies on the grid, and an integer runtime can compute it. `offset` is in steps: LSQ+ writes
beta = -step * offset. The option `free_offset` takes it unrounded, so that integers(x) is
clip(round(x / step + offset)): not deployable. A mid-rise grid (`mid_rise`, for weights) is the same with a
constant offset of -1/2, and its numbers are odd multiples of step / 2: with two bits -3, -1, 1 and 3, where
the plain grid has -2, -1, 0 and 1 steps, one more below 0 than above (ParetoQ, Liu et al. 2025,
arXiv:2502.02631: "stretched elastic quant").
"""

from inspect import signature
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli import operators, plugins
from qdetr_cli.errors import PluginError, RecipeError, RunError
from qdetr_cli.fake_quant import Grid, fake_quantize, make_grid
from qdetr_cli.ranges import STEP_FLOOR, grid_from_range, is_shifted
from qdetr_cli.recipe import QuantFormat
from qdetr_cli.samples import RangeSample


class FakeQuantizer(nn.Module):
    """Base of all quantizers: owns the grid, watches values to place it, and rounds to it.

    A subclass says how gradients flow in `fake_quantize`, and may derive the step in use from `step` in
    `live_step`. `axis` is the dimension of x that owns the steps: x of shape (.., channels, ..) has
    `channels` steps; None: one step. `batched` says that dimension 0 of x counts images, so that gradients do
    not depend on the batch size.
    """

    OPTIONS: frozenset[str] = frozenset({"free_offset"})  # valid keys of `quantizer_options`

    calibrated: Tensor
    step: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, format: QuantFormat, *, axis: int | None, channels: int, batched: bool = True) -> None:
        super().__init__()
        self._check_options(format)
        self._check_init(format)
        _check_mid_rise(format)
        assert channels == 1 if axis is None else channels >= 1
        self.format = format
        self.axis = axis
        self.channels = channels
        self.batched = batched
        self.enabled = True
        self.path = ""  # set by `rewrite`, for messages
        self.step = nn.Parameter(torch.ones(channels))
        if format.symmetric:
            self.register_parameter("offset", None)
        else:
            self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("calibrated", torch.tensor(False))
        self._ready = False  # `calibrated` as a plain bool, so that no branch depends on a tensor
        self._sample: RangeSample | None = None

    def _check_options(self, format: QuantFormat) -> None:
        unknown = sorted(set(format.quantizer_options) - self.OPTIONS)
        if unknown:
            valid = ", ".join(sorted(self.OPTIONS)) or "none"
            raise RecipeError(
                f"quantizer {format.quantizer}: unknown option {unknown[0]!r}; valid options: {valid}"
            )
        if format.symmetric and format.quantizer_options.get("free_offset", False):
            raise RecipeError(
                f"quantizer {format.quantizer}: free_offset has no effect where symmetric is true"
            )

    def _check_init(self, format: QuantFormat) -> None:
        try:
            signature(plugins.get("range", format.init)).bind(None, format, **format.init_options)
        except TypeError as error:
            options = ", ".join(list(signature(plugins.get("range", format.init)).parameters)[2:]) or "none"
            raise RecipeError(f"init {format.init}: {error}; valid options: {options}") from None

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, same shape and dtype; x itself while switched off or observing.

        Raises RunError when it is switched on and was never calibrated.
        """
        if self._sample is not None:
            self.observe(x)
            return x
        if not self.enabled:
            return x
        if not self._ready:
            raise RunError(
                f"{self._name()} is not calibrated: run `qdetr quantize`, or load a checkpoint that it wrote"
            )
        return self._exported(x) if torch.compiler.is_exporting() else self.fake_quantize(x)

    def _exported(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid: one operator of the exported graph, but for a free offset."""
        grid = self.grid_for(x)
        if self.format.mid_rise:
            x, grid = grid.round(x, self.axis), grid.whole()
        if grid.shifted:
            return grid.round(x, self.axis)
        return operators.fake_quantize(x, grid, self.axis, self.path)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, with gradients for x, step and offset."""
        raise NotImplementedError

    def live_step(self) -> Tensor:
        """Return the step in use, (channels,). A subclass may derive it from `step`, differentiably."""
        return self.step

    def grid(self) -> Grid:
        """Return the grid in use: what `forward`, `integers` and `dequantize` all compute with."""
        return make_grid(self.live_step(), self.offset, self.format)

    def grid_for(self, x: Tensor) -> Grid:
        """Return the grid that x is exported with: the one in use, unless a subclass derives it from x."""
        return self.grid()

    def whole_grid(self, x: Tensor) -> Grid:
        """Return the grid of whole numbers that stands for x in an integer model."""
        grid = self.grid_for(x)
        return grid.whole() if self.format.mid_rise else grid

    @torch.no_grad()
    def zero_point(self) -> Tensor:
        """Return the integer that stands for 0, int32 (channels,). RunError for a shifted grid: none does."""
        if is_shifted(self.format):
            what = "a mid-rise grid" if self.format.mid_rise else "a free offset, so it cannot be deployed"
            raise RunError(f"{self._name()} has no integer that stands for 0: it has {what}")
        zero = self.grid().zero
        return (torch.zeros_like(self.step) if zero is None else zero).to(torch.int32)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Return the grid numbers of x, int32 in qmin..qmax, shaped as x."""
        return self.grid().integers(x, self.axis).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, q: Tensor) -> Tensor:
        """Return the real values of grid numbers, float32, shaped as q."""
        return self.grid().dequantize(q, self.axis)

    @property
    def observing(self) -> bool:
        """Whether `forward` records what it sees and passes it on unchanged."""
        return self._sample is not None

    def start_observing(self) -> None:
        """Begin to record, from nothing."""
        self._sample = RangeSample(self.channels)

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Record x. `mask` (bool, broadcastable to x) is True where a value counts: padding must not.

        Raises RunError for values that are not finite.
        """
        assert self._sample is not None, "observe without start_observing"
        if not self._sample.add(x, self.axis, mask):
            raise RunError(f"{self._name()} met values that are not finite while it was calibrated")

    @torch.no_grad()
    def finish_observing(self) -> bool:
        """Set step and offset by the format's range plugin from what was seen; False if nothing was.

        A channel that saw only zeros, or nothing, gets the mean step of the others, or a grid that spans one
        unit.
        """
        assert self._sample is not None, "finish_observing without start_observing"
        values, seen, self._sample = self._sample.values(), not self._sample.empty, None
        plugin = plugins.get("range", self.format.init)
        low, high = plugin(values, self.format, **self.format.init_options)
        self._check_range(low, high)
        self._place(low, high, alive=values[:, -2:].ne(0).any(1))
        return seen

    def _check_range(self, low: Tensor, high: Tensor) -> None:
        for end in (low, high):
            if end.shape != (self.channels,) or not end.isfinite().all():
                raise PluginError(
                    f"{self._name()}: range plugin {self.format.init!r} returned {end}; "
                    f"low and high must be finite, shape ({self.channels},)"
                )

    def _place(self, low: Tensor, high: Tensor, alive: Tensor) -> None:
        """Set the grid to span [low, high], (channels,) each, where alive."""
        step, zero_point = grid_from_range(low, high, self.format)
        spare = step[alive].mean() if alive.any() else torch.tensor(1.0 / self.format.qmax)
        self.step.copy_(torch.where(alive, step, spare))
        if self.offset is not None:
            self.offset.copy_(torch.where(alive, zero_point, 0.0))
        self.calibrated.fill_(True)
        self._ready = True

    def _name(self) -> str:
        return f"quantizer {self.path}" if self.path else "a quantizer without a path"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = not self.calibrated.is_meta and bool(self.calibrated)

    def extra_repr(self) -> str:
        """Return bits and granularity for `print(model)`."""
        kind = "symmetric" if self.format.symmetric else "asymmetric"
        bits = self.format.bits
        return f"{bits} bits, {kind}, {self.channels} step(s), axis={self.axis}, enabled={self.enabled}"


@plugins.register("quantizer", "lsq")
class LSQ(FakeQuantizer):
    """Learned step size (Esser et al. 2020, arXiv:1902.08153), with LSQ+'s offset (Bhalgat et al. 2020,
    2004.09576).

    The gradients of step and offset are scaled by 1 / sqrt(numel * qmax), numel being what shares a step in
    one image.
    """

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, same shape and dtype."""
        return fake_quantize(
            x, self.live_step(), self.offset, self.format, axis=self.axis, scale=self.gradient_scale(x)
        )

    def gradient_scale(self, x: Tensor) -> float:
        """Return 1 / sqrt(numel * qmax); numel is per image, so that the batch size does not matter."""
        images = x.shape[0] if self.batched and x.dim() > 1 else 1
        shared = x.numel() / max(images, 1) / self.channels
        return 1.0 / sqrt(max(shared, 1.0) * self.format.qmax)


@plugins.register("quantizer", "statistics")
class Statistics(LSQ):
    """A weight's step from its statistics instead of learned: 2 * mean|w| / sqrt(qmax), LSQ's first guess.

    It moves with the weights and cannot oscillate on its own, which helps at 3 bits and below. For weights
    alone: an activation's step must not depend on the batch.
    """

    def __init__(self, format: QuantFormat, *, axis: int | None, channels: int, batched: bool = True) -> None:
        super().__init__(format, axis=axis, channels=channels, batched=batched)
        self.step.requires_grad_(False)

    def _check_options(self, format: QuantFormat) -> None:
        super()._check_options(format)
        if not format.symmetric or format.unsigned:
            raise RecipeError("quantizer statistics: is for weights; use lsq for activations")
        if format.mid_rise:
            raise RecipeError(
                "quantizer statistics: knows no step of a mid-rise grid; use lsq, or drop mid_rise"
            )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid, same shape and dtype."""
        self._follow(x)
        return super().fake_quantize(x)

    def live_step(self) -> Tensor:
        """Return the step in use, (channels,): a copy, for a layer may run twice before gradients flow."""
        return self.step.detach().clone()

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Return the grid numbers of x, int32 in qmin..qmax, shaped as x."""
        self._follow(x)
        return super().integers(x)

    def grid_for(self, x: Tensor) -> Grid:
        """Return the grid of x, whatever x was seen last: `step` may be an average of several."""
        return make_grid(self._steps(x), self.offset, self.format)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        self.step.copy_(self._steps(x))

    def _steps(self, x: Tensor) -> Tensor:
        """Return the steps of x, (channels,)."""
        rows = x.detach().float().abs()
        rows = rows.reshape(1, -1) if self.axis is None else rows.movedim(self.axis, 0).flatten(1)
        return (2 * rows.mean(1) / sqrt(self.format.qmax)).clamp_min(STEP_FLOOR)


@plugins.register("quantizer", "fixed")
class Fixed(LSQ):
    """A grid that stays where it was put: by calibration, or by a packed file, for its integers."""

    def __init__(self, format: QuantFormat, *, axis: int | None, channels: int, batched: bool = True) -> None:
        super().__init__(format, axis=axis, channels=channels, batched=batched)
        self.requires_grad_(False)


def _check_mid_rise(format: QuantFormat) -> None:
    if format.mid_rise and format.bits == 8:
        raise RecipeError(
            "mid_rise: its integers are odd and reach 2^bits - 1, at 8 bits more than an int8 holds; "
            "give 7 bits or fewer, or mid_rise: false"
        )


def make_quantizer(
    format: QuantFormat, *, axis: int | None, channels: int, batched: bool = True
) -> FakeQuantizer:
    """Return a new quantizer of the format's kind. PluginError: unknown kind. RecipeError: bad options."""
    made = plugins.get("quantizer", format.quantizer)(format, axis=axis, channels=channels, batched=batched)
    if not isinstance(made, FakeQuantizer):
        raise PluginError(
            f"quantizer {format.quantizer!r} is no subclass of qdetr_cli.quantizers.FakeQuantizer"
        )
    return made
