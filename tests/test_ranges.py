"""Where grids are placed, against brute force and numpy, and how fair the sample behind it is."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.errors import RecipeError
from qdetr_cli.ranges import grid_from_range, minmax, mse, percentile
from qdetr_cli.recipe import QuantFormat
from qdetr_cli.samples import RangeSample

SIGNED = QuantFormat(bits=4, symmetric=True, unsigned=False, per="tensor", quantizer="lsq", init="mse")
OFFSET = replace(SIGNED, symmetric=False)
UNSIGNED = replace(SIGNED, unsigned=True)


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gauss(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random())


DISTRIBUTIONS = {
    "gauss": lambda: gauss(1, 4096),
    "relu": lambda: gauss(1, 4096).relu(),
    "silu": lambda: torch.nn.functional.silu(2 * gauss(1, 4096)),
    "shifted": lambda: gauss(1, 4096) + 1.5,
    "skewed": lambda: gauss(1, 4096).exp() - 1,
    "outliers": lambda: (
        gauss(1, 4096) * torch.where(torch.rand(1, 4096, generator=_random()) < 0.002, 30.0, 1.0)
    ),
    "softmax": lambda: (3 * gauss(32, 128)).softmax(1).view(1, -1),
}


def error(values: np.ndarray, step: float, zero: float, format: QuantFormat) -> float:
    q = np.clip(np.round(values / step) + zero, format.qmin, format.qmax)
    return float((((q - zero) * step - values) ** 2).mean())


def brute_force(values: Tensor, format: QuantFormat) -> float:
    """The least mean squared error over 150 steps and every zero point."""
    x = values.numpy().astype(np.float64).ravel()
    steps = np.geomspace(np.abs(x).max() * 4e-3, np.abs(x).max() * 1.5, 150)
    zeros = [0] if format.symmetric else range(format.qmin, format.qmax + 1)
    return min(error(x, step, zero, format) for step in steps for zero in zeros)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("format", [SIGNED, OFFSET], ids=["signed", "offset"])
def test_mse_is_as_good_as_brute_force(format, name, bits):
    values = DISTRIBUTIONS[name]()
    format = replace(format, bits=bits)
    step, zero = grid_from_range(*mse(_with_extremes(values), format), format)
    mine = error(values.double().numpy(), step.item(), zero.item(), format)
    assert mine <= 1.02 * brute_force(values, format)


def _with_extremes(values: Tensor) -> Tensor:
    return torch.cat((values, values.amin(1, keepdim=True), values.amax(1, keepdim=True)), 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_on_an_unsigned_grid(bits):
    format, values = replace(UNSIGNED, bits=bits), DISTRIBUTIONS["softmax"]()
    step, zero = grid_from_range(*mse(_with_extremes(values), format), format)
    assert zero.item() == 0
    assert error(values.double().numpy(), step.item(), 0, format) <= 1.02 * brute_force(values, format)


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)], ids=str)
def test_mse_finds_the_known_optimum_of_a_gaussian(bits, step):
    """Max (1960), table II: the best uniform quantizers of a unit Gaussian.

    A free offset reaches them, as does mid-rise.
    """
    format = replace(OFFSET, bits=bits, quantizer_options={"free_offset": True})
    values = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20000)[None] + 0.5) / 20000)
    found, _ = grid_from_range(*mse(_with_extremes(values), format), format)
    assert found.item() == pytest.approx(step, rel=0.03)
    format = replace(SIGNED, bits=bits, mid_rise=True)
    found, zero = grid_from_range(*mse(_with_extremes(values), format), format)
    assert found.item() == pytest.approx(step, rel=0.005)
    assert zero.item() == -0.5


def test_mse_treats_channels_alone():
    values = gauss(5, 400) * torch.tensor([1e-3, 0.1, 1.0, 7.0, 1e4])[:, None]
    values = _with_extremes(values)
    for format in (SIGNED, OFFSET):
        together = mse(values, format)
        for row in range(5):
            for whole, alone in zip(together, mse(values[row : row + 1], format), strict=True):
                torch.testing.assert_close(whole[row : row + 1], alone)


def test_mse_of_a_large_layer_takes_a_moment():
    begin = time.perf_counter()
    mse(_with_extremes(gauss(512, 2304)), SIGNED)
    assert time.perf_counter() - begin < 3  # 41 M weights are 35 times as many


def test_minmax_is_exact():
    values = _with_extremes(gauss(3, 50))
    low, high = minmax(values, SIGNED)
    assert torch.equal(low, values.amin(1))
    assert torch.equal(high, values.amax(1))


@pytest.mark.parametrize("percent", [90.0, 99.0, 100.0], ids=str)
def test_percentile_is_numpys(percent):
    values = gauss(3, 1000)
    low, high = percentile(_with_extremes(values), SIGNED, percent=percent)
    expected = np.percentile(values.numpy(), [100 - percent, percent], axis=1)
    np.testing.assert_allclose(torch.stack((low, high)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("percent", [0.0, 50.0, 101.0], ids=str)
def test_percentile_refuses_what_is_none(percent):
    with pytest.raises(RecipeError, match=rf"{percent} is not in \(50, 100\]"):
        percentile(gauss(1, 10), SIGNED, percent=percent)


def test_built_in_ranges_are_registered():
    assert {"minmax", "mse", "percentile"} <= set(plugins.names("range"))


@pytest.mark.parametrize(
    ("low", "high", "step", "zero"),
    [
        pytest.param(-8.0, 7.0, 1.0, 0.0, id="whole"),
        pytest.param(0.0, 15.0, 1.0, -8.0, id="not-negative"),
        pytest.param(3.0, 15.0, 1.0, -8.0, id="zero-is-drawn-in-from-below"),
        pytest.param(-15.0, -3.0, 1.0, 7.0, id="zero-is-drawn-in-from-above"),
        pytest.param(-4.2, 10.8, 1.0, -4.0, id="zero-point-is-rounded"),
    ],
)
def test_offset_grids_hold_zero(low, high, step, zero):
    found = grid_from_range(torch.tensor([low]), torch.tensor([high]), OFFSET)
    assert [x.item() for x in found] == pytest.approx([step, zero])


def test_symmetric_grids_cover_the_range():
    step, zero = grid_from_range(torch.tensor([-8.0, -1.0, -3.0]), torch.tensor([1.0, 7.0, 3.5]), SIGNED)
    assert step.tolist() == pytest.approx([1.0, 1.0, 0.5])
    assert zero.tolist() == [0.0, 0.0, 0.0]


def sampled(batches: list[Tensor], axis: int | None = None, channels: int = 1) -> RangeSample:
    sample = RangeSample(channels)
    for batch in batches:
        assert sample.add(batch, axis)
    return sample


def test_a_small_stream_is_kept_whole():
    x = gauss(4, 30, 5)
    values = sampled([x[:1], x[1:]], axis=2, channels=5).values()
    assert torch.equal(values[:, :-2].sort(1).values, x.movedim(2, 0).flatten(1).sort(1).values)
    assert torch.equal(values[:, -2], x.amin((0, 1)))


@pytest.mark.parametrize(
    "sizes", [[200] * 30, [4000, 1, 900, 1099], [1] * 10 + [5990]], ids=["even", "uneven", "late"]
)
def test_the_sample_is_fair_whatever_the_batches(sizes):
    """Each part of the stream, marked by its value, appears in proportion to its length."""
    x = torch.arange(6000.0)[:, None].expand(-1, 100)
    values = sampled(list(x.split(sizes))).values()[0, :-2]
    assert 1 << 15 <= len(values) <= 1 << 16
    share = torch.histc(values, bins=10, min=0, max=6000) / len(values)
    torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_the_sample_sees_every_feature_of_periodic_data():
    x = torch.arange(256.0).expand(4000, 256)
    values = sampled([x, x]).values()[0, :-2]
    share = torch.histc(values, bins=256, min=0, max=256) / len(values) * 256
    assert share.min() > 0.7
    assert share.max() < 1.3


def test_extremes_are_exact_and_memory_is_bounded():
    batches = [gauss(8, 3, 5000) for _ in range(6)]
    batches[3][5, 1, 4321], batches[2][0, 2, 17] = 99.0, -98.0
    values = sampled(batches, axis=1, channels=3).values()
    assert values.shape[1] <= (1 << 16) // 3 + 2
    assert values[1, -1] == 99.0
    assert values[2, -2] == -98.0


def test_the_sample_is_deterministic():
    batches = [gauss(20, 5000), gauss(30, 5000) + 1]
    assert torch.equal(sampled(batches).values(), sampled(batches).values())
