"""Balance of q and k: softmax keeps what it gives, gains are those of the formula, few bits lose less."""

import pytest
import torch

from qdetr_cli.balance import Balance
from qdetr_cli.errors import RunError
from qdetr_cli.quantizers import make_quantizer
from qdetr_cli.recipe import Format, resolve_format

HEADS, DIMENSIONS, QUERIES, KEYS = 3, 8, 11, 13


def some(tokens: int, *, batch: int = 4, seed: int = 0) -> torch.Tensor:
    """(B, N, L, d): each dimension of each head has a mean and a spread of its own, from 0.05 to 20."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (2.6 * torch.rand(HEADS, 1, DIMENSIONS, generator=generator) - 1.3)
    center = 2 * spread * torch.randn(HEADS, 1, DIMENSIONS, generator=generator)
    generator = torch.Generator().manual_seed(seed + 100 * batch)
    return center + spread * torch.randn(batch, HEADS, tokens, DIMENSIONS, generator=generator)


def pair(**other: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of a product: q (B, N, L, d) and the transposed k (B, N, d, L)."""
    return 0.1 * some(QUERIES, **other), 0.1 * some(KEYS, seed=1, **other).mT


def fitted(*pairs: tuple[torch.Tensor, torch.Tensor]) -> Balance:
    made = Balance(HEADS, DIMENSIONS)
    made.start_observing()
    for q, k in pairs:
        assert made.q(q) is q, "what is observed passes unchanged"
        assert made.k(k) is k
    assert made.finish_observing()
    return made


def test_attention_stays_the_same():
    """With a mask, and for values that were not seen in the fit."""
    made, (q, k) = fitted(pair()), (each.double() for each in pair(batch=2))
    mask = torch.zeros(KEYS, dtype=torch.float64)
    mask[-4:] = -1e9
    with torch.no_grad():
        balanced = made.q(q), made.k(k)
        assert not torch.allclose(balanced[0], q, rtol=0.1)
        expected, got = ((each @ other + mask).softmax(-1) for each, other in ((q, k), balanced))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_the_gain_of_every_dimension_is_that_of_the_formula():
    """By hand over the tokens of two batches of unlike sizes: sqrt(spread of k / rms of q)."""
    pairs = pair(), pair(batch=1)
    made = fitted(*pairs)
    for head in range(HEADS):
        for dimension in range(DIMENSIONS):
            q = torch.cat([each[:, head, :, dimension].flatten() for each, _ in pairs]).double()
            k = torch.cat([each[:, head, dimension].flatten() for _, each in pairs]).double()
            gain = float((k.std(correction=0) / q.square().mean().sqrt()).sqrt())
            assert made.q.gain[head, dimension].item() == pytest.approx(gain, rel=1e-4)
            assert made.k.gain[head, dimension].item() == pytest.approx(1 / gain, rel=1e-4)
            assert made.k.center[head, dimension].item() == pytest.approx(float(k.mean()), rel=1e-4, abs=1e-6)
    assert made.q.center is None, "it would change the attention"


def test_both_sides_have_the_same_size_in_every_dimension():
    q, k = pair()
    made = fitted((q, k))
    with torch.no_grad():
        left, right = made.q(q).square().mean((0, 2)), made.k(k).square().mean((0, 3))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def product_error(made: Balance, power: float, q: torch.Tensor, k: torch.Tensor) -> float:
    """The mean squared error of the centered scores with 4 bits and one step per head, gains to a power."""
    sides = []
    with torch.no_grad():
        for side, x, sign in ((made.q, q, power), (made.k, k, power)):
            gain = side.gain**sign
            along = gain[:, None, :] if side is made.q else gain[:, :, None]
            center = 0.0 if side is made.q else side.center[:, :, None]
            balanced = (x - center) * along
            slot = "q" if side is made.q else "k"
            quantizer = make_quantizer(resolve_format(slot, Format(bits=4)), axis=1, channels=HEADS)
            quantizer.start_observing()
            quantizer(balanced)
            quantizer.finish_observing()
            sides.append(quantizer(balanced))
        error = sides[0] @ sides[1] - (q @ (k - made.k.center[:, :, None]))
    return float(error.square().mean())


def test_four_bits_lose_less_and_least_at_the_gain_of_the_formula():
    q, k = pair(batch=16)
    made = fitted((q, k))
    best = product_error(made, 1.0, q, k)
    assert best < 0.5 * product_error(made, 0.0, q, k), "no gain: one step for large and small dimensions"
    assert best < product_error(made, 0.5, q, k)
    assert best < product_error(made, 1.5, q, k)


def test_until_it_is_fitted_it_passes_all_on():
    made, (q, k) = Balance(HEADS, DIMENSIONS), pair()
    assert torch.equal(made.q(q), q)
    made.start_observing()
    made.q(q)
    assert not made.finish_observing(), "k was not seen"
    assert torch.equal(made.q(q), q)
    assert torch.equal(made.k(k), k)


@pytest.mark.parametrize("dead", ["q", "k", "both", "one dimension"])
def test_what_is_zero_or_constant_gets_a_finite_gain(dead: str):
    """DETR's first decoder layer: the content of all queries is 0, and so may be their projections."""
    q, k = pair()
    if dead in ("q", "both"):
        q = torch.zeros_like(q)
    if dead in ("k", "both"):
        k = torch.ones_like(k)
    if dead == "one dimension":
        q[..., 3], k[..., 3, :] = 0.0, 5.0
    made = fitted((q, k))
    gains = torch.cat([made.q.gain, made.k.gain])
    assert bool(gains.isfinite().all())
    assert float(gains.detach().max()) < 1e5
    with torch.no_grad():
        expected, got = ((each @ other).softmax(-1) for each, other in ((q, k), (made.q(q), made.k(k))))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_values_that_are_not_finite_are_refused_by_name():
    made, (q, _) = Balance(HEADS, DIMENSIONS), pair()
    made.q.path = "model.decoder.balance.q"
    made.start_observing()
    with pytest.raises(RunError, match=r"model\.decoder\.balance\.q: met values that are not finite"):
        made.q(torch.full_like(q, float("inf")))


def test_low_precision_stays_as_it_is():
    made, (q, k) = fitted(pair()), pair(batch=1)
    assert made.q(q.bfloat16()).dtype == torch.bfloat16
    assert made.k(k.bfloat16()).dtype == torch.bfloat16
