"""Weights that flip between grid numbers: algorithm 1 of Nagel et al. by hand and by loops; freezing."""

import io
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from qdetr_cli.errors import RecipeError
from qdetr_cli.layers import QuantLinear
from qdetr_cli.oscillation import OscillationFreezer
from qdetr_cli.recipe import Oscillation, QuantFormat

THREE = QuantFormat(bits=3, symmetric=True, unsigned=False, per="tensor", quantizer="lsq", init="mse")
NEVER = {"start": 1.0, "end": 1.0}


def layer(weights: list[float], format: QuantFormat | None = THREE) -> nn.Sequential:
    """One QuantLinear with one row of weights; its step is 1, so that a weight rounds to its grid number."""
    made = QuantLinear.from_float(nn.Linear(len(weights), 1), weight=format, input=None)
    put(made, weights)
    return nn.Sequential(made)


def put(linear: nn.Module, weights: list[float]) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([weights]))


def row(tensor: torch.Tensor) -> list[float]:
    return tensor[0].tolist()


def test_flips_by_hand():
    """A flip is a change against the last change, however long ago that was; averages with momentum 1/2.

    back and forth: 0 1 0 1 1 0, flips - x x - x      one way: 0 1 2 3 3 3, no flip
    later back:     0 1 1 1 0 0, flips - - - x -      down, then up:  0 -1 -1 -2 -2 -1, the last
    """
    columns = ([0, 1, 0, 1, 1, 0], [0, 1, 2, 3, 3, 3], [0, 1, 1, 1, 0, 0], [0, -1, -1, -2, -2, -1])
    first, *steps = [[float(each) for each in step] for step in zip(*columns, strict=True)]
    model = layer(first)
    freezer = OscillationFreezer(model, Oscillation(momentum=0.5, **NEVER))
    (track,) = freezer.tracks.values()
    flips, means = [row(track.flips)], [row(track.mean)]
    for index, step in enumerate(steps):
        put(model[0], [each + 0.2 for each in step])  # not on the grid: the number counts
        freezer.update((index + 1) / 5)
        flips.append(row(track.flips))
        means.append(row(track.mean))
    back, one_way, later, down = zip(*flips, strict=True)
    assert back == pytest.approx((0, 0, 0.5, 0.75, 0.375, 0.6875))
    assert one_way == (0, 0, 0, 0, 0, 0)
    assert later == pytest.approx((0, 0, 0, 0, 0.5, 0.25))
    assert down == pytest.approx((0, 0, 0, 0, 0, 0.5))
    assert next(zip(*means, strict=True)) == pytest.approx((0, 0.5, 0.25, 0.625, 0.8125, 0.40625))
    assert freezer.frozen == 0.0


def by_loops(
    numbers: list[list[int]], momentum: float, threshold: float
) -> tuple[list[float], list[int | None]]:
    """Algorithm 1 for one weight after another: flips per step, and where each was frozen (None: nowhere)."""
    flips, frozen = [], []
    for sequence in zip(*numbers, strict=True):
        rate, mean, last_sign, place = 0.0, float(sequence[0]), 0, None
        for before, now in pairwise(sequence):
            sign = (now > before) - (now < before)
            flipped = sign != 0 and last_sign != 0 and sign != last_sign
            rate = momentum * flipped + (1 - momentum) * rate
            mean = momentum * now + (1 - momentum) * mean
            last_sign = sign or last_sign
            if place is None and rate > threshold:
                place = round(mean)
        flips.append(rate)
        frozen.append(place)
    return flips, frozen


def test_random_walks_by_loops():
    """The walks are prescribed (also for weights that are frozen: what they would have done)."""
    generator = torch.Generator().manual_seed(0)
    walks = torch.randint(-4, 4, (12, 40), generator=generator)
    walks[:, :20] = walks[:, :20].clamp(-1, 0).sort(0).values  # half of them go one way only
    model = layer(walks[0].float().tolist())
    freezer = OscillationFreezer(model, Oscillation(momentum=0.1, start=0.4, end=0.4))
    for walk in walks[1:]:
        put(model[0], walk.float().tolist())
        freezer.update(0.5)
    (track,) = freezer.tracks.values()
    flips, frozen = by_loops(walks.tolist(), 0.1, 0.4)
    assert row(track.flips) == pytest.approx(flips, abs=1e-6)
    expected = [place is not None for place in frozen]
    assert row(track.frozen) == expected
    assert 0 < sum(expected) < 20
    for held, place in zip(row(track.number), frozen, strict=True):
        assert place is None or held == place
    assert freezer.frozen == pytest.approx(sum(expected) / 40)


def test_a_frozen_weight_stays_on_its_number_while_its_step_moves():
    model = layer([0.0, 0.0])
    freezer = OscillationFreezer(model, Oscillation(momentum=0.5, start=0.6, end=0.6))
    for number in (1.0, 0.0, 1.0):  # flips per step 0, 0.5, 0.75; mean 0.625
        put(model[0], [number + 0.3, 0.3])
        freezer.update(0.1)
    assert row(model[0].weight) == pytest.approx([1.0, 0.3]), "rounds to 1; the other keeps its real value"
    quantizer = model[0].weight_quantizer
    for step, wish in ((1.0, -2.0), (0.5, 3.0), (2.0, 0.0)):
        with torch.no_grad():
            quantizer.step.fill_(step)
        put(model[0], [wish, 0.3])
        freezer.update(0.9)
        assert row(model[0].weight) == pytest.approx([1.0 * step, 0.3])
        assert int(quantizer.integers(model[0].weight)[0, 0]) == 1
    assert freezer.frozen == 0.5


@pytest.mark.parametrize("number", [-4, 3], ids=["lowest", "highest"])
def test_a_weight_frozen_at_an_end_of_the_grid_stays_there(number):
    inner = number + 1 if number < 0 else number - 1
    model = layer([float(number)])
    freezer = OscillationFreezer(model, Oscillation(momentum=0.2, start=0.3, end=0.3))
    for each in (inner, number, inner, number, number):
        put(model[0], [float(each)])
        freezer.update(0.5)
    assert freezer.frozen == 1.0
    put(model[0], [0.0])
    freezer.update(0.6)
    assert row(model[0].weight) == [float(number)]


def test_the_threshold_falls_along_a_cosine():
    freezer = OscillationFreezer(layer([0.0]), Oscillation(start=0.04, end=0.01, after=0.2))
    assert freezer.threshold(0.0) is None
    assert freezer.threshold(0.19) is None
    assert freezer.threshold(0.2) == pytest.approx(0.04)
    assert freezer.threshold(0.4) == pytest.approx(0.01 + 0.015 * (1 + math.cos(math.pi / 4)))
    assert freezer.threshold(0.6) == pytest.approx(0.025)
    assert freezer.threshold(1.0) == pytest.approx(0.01)
    late = OscillationFreezer(layer([0.0]), Oscillation(start=0.04, end=0.01, after=1.0))
    assert late.threshold(1.0) == pytest.approx(0.04)


def test_nothing_is_frozen_before_its_time_but_flips_are_counted():
    model = layer([0.0])
    freezer = OscillationFreezer(model, Oscillation(momentum=0.5, start=0.1, end=0.1, after=0.5))
    for index, number in enumerate((1.0, 0.0, 1.0)):
        put(model[0], [number])
        freezer.update(0.1 * index)
    assert freezer.frozen == 0.0
    freezer.update(0.5)
    assert freezer.frozen == 1.0


def test_only_weights_of_few_bits_are_watched():
    four = replace(THREE, bits=4)
    model = nn.Sequential(layer([0.0]), layer([0.0], four), layer([0.0], None), nn.Linear(1, 1))
    assert list(OscillationFreezer(model, Oscillation(bits=3)).layers) == ["0.0"]
    assert list(OscillationFreezer(model, Oscillation(bits=4)).layers) == ["0.0", "1.0"]


def test_watching_nothing_is_an_error():
    with pytest.raises(RecipeError, match=r"train\.oscillation: this recipe gives no weight 2 bits or fewer"):
        OscillationFreezer(layer([0.1, 0.2]), Oscillation(bits=2))


def test_a_weight_that_is_not_quantized_yet_is_left_alone():
    """A stage has its quantizer off: it moves freely, and its flips do not count."""
    model = layer([0.0])
    freezer = OscillationFreezer(model, Oscillation(momentum=0.5, start=0.0, end=0.0))
    model[0].weight_quantizer.enabled = False
    for number in (1.0, 0.0, 1.0, 0.0):
        put(model[0], [number + 0.25])
        freezer.update(0.5)
        assert row(model[0].weight) == [number + 0.25]
    (track,) = freezer.tracks.values()
    assert row(track.flips) == [0.0]
    assert freezer.frozen == 0.0


def test_eight_bits_do_not_overflow():
    """From -128 to 127 is upwards, so the way back down is a flip."""
    model = layer([-128.0], replace(THREE, bits=8))
    freezer = OscillationFreezer(model, Oscillation(bits=8, momentum=0.5, **NEVER))
    (track,) = freezer.tracks.values()
    put(model[0], [127.0])
    freezer.update(0.1)
    assert row(track.direction) == [1]
    put(model[0], [126.0])
    freezer.update(0.2)
    assert row(track.flips) == [0.5]


def test_its_state_resumes():
    """Through a file, in the middle: the same flips, frozen weights and numbers as without a stop."""
    generator = torch.Generator().manual_seed(1)
    walks = torch.randint(-4, 4, (12, 30), generator=generator).float()
    spec = Oscillation(momentum=0.2, start=0.5, end=0.2)
    straight, begun, resumed = (layer(walks[0].tolist()) for _ in range(3))
    whole, first, second = (OscillationFreezer(each, spec) for each in (straight, begun, resumed))
    for index, walk in enumerate(walks[1:]):
        done = (index + 1) / 11
        if index == 5:
            file = io.BytesIO()
            torch.save({"model": begun.state_dict(), "oscillation": first.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            resumed.load_state_dict(state["model"])
            second.load_state_dict(state["oscillation"])
            assert 0 < second.frozen < 1
        for model, freezer in ((straight, whole), (begun, first) if index < 5 else (resumed, second)):
            put(model[0], walk.tolist())
            freezer.update(done)
    assert torch.equal(straight[0].weight, resumed[0].weight)
    ((path, expected),) = whole.state_dict().items()
    assert all(torch.equal(value, second.state_dict()[path][name]) for name, value in expected.items())
