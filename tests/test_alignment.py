"""Distribution alignment: against layer norm and NumPy's least squares."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.errors import RecipeError, RunError
from qdetr_cli.recipe import QuantFormat, recipe_from_dict

HEADS, DIMENSIONS = 3, 8


def some(*, batch: int = 4, tokens: int = 11, seed: int = 0) -> torch.Tensor:
    """(B, N, L, d): each dimension of each head with a mean and spread of its own, tokens of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 + 2 * torch.rand(HEADS, 1, DIMENSIONS, generator=torch.Generator().manual_seed(90))
    center = 3 * torch.randn(HEADS, 1, DIMENSIONS, generator=torch.Generator().manual_seed(91))
    sizes = 0.5 + torch.rand(batch, 1, tokens, 1, generator=generator)
    return sizes * (center + spread * torch.randn(batch, HEADS, tokens, DIMENSIONS, generator=generator))


def alignment(axis: int = -1) -> DistributionAlignment:
    return DistributionAlignment(HEADS, DIMENSIONS, axis=axis)


def fitted(*seen: torch.Tensor, axis: int = -1) -> DistributionAlignment:
    made = alignment(axis)
    made.start_observing()
    for x in seen:
        assert made(x) is x, "what is observed passes unchanged"
    assert made.finish_observing()
    return made


def normed(x: torch.Tensor) -> torch.Tensor:
    """Layer norm over the head's dimensions, without gain."""
    return F.layer_norm(x, (DIMENSIONS,), eps=1e-5)


def test_it_is_layer_norm_and_a_gain_for_each_head():
    made, x = fitted(some()), some(seed=1)
    with torch.no_grad():
        made.gamma.normal_()
        made.beta.normal_()
    for head in range(HEADS):
        expected = F.layer_norm(x[:, head], (DIMENSIONS,), made.gamma[head], made.beta[head], eps=1e-5)
        torch.testing.assert_close(made(x)[:, head], expected)


def test_the_fit_is_numpys_least_squares_for_each_head_and_dimension():
    """gamma * normed + beta ~ x, over the tokens of all batches, which have unlike sizes."""
    batches = some(), some(batch=1, tokens=5, seed=1)
    made = fitted(*batches)
    for head in range(HEADS):
        for dimension in range(DIMENSIONS):
            x, n = (
                torch.cat([each[:, head, :, dimension].flatten() for each in of]).double().numpy()
                for of in (batches, [normed(batch.double()) for batch in batches])
            )
            (gain, shift), *_ = np.linalg.lstsq(np.stack([n, np.ones_like(n)], 1), x, rcond=None)
            assert made.gamma[head, dimension].item() == pytest.approx(gain, rel=1e-4, abs=1e-5)
            assert made.beta[head, dimension].item() == pytest.approx(shift, rel=1e-4, abs=1e-4)


def test_a_fit_loses_less_than_the_bare_norm_and_than_its_neighbours():
    x = some()
    made = fitted(x)

    def error() -> float:
        return float((made(x) - x).square().mean().detach())

    best = error()
    assert best < 0.5 * float((normed(x) - x).square().mean())
    for parameter in (made.gamma, made.beta):
        for factor in (0.9, 1.1):
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(factor)
            assert error() > best
            with torch.no_grad():
                parameter.copy_(kept)


def test_what_is_normed_already_is_preserved():
    """Also with a gain and shift that are the same in all dimensions, as after a layer norm of the head."""
    x = normed(some())
    for given in (x, 3.0 * x - 0.5):
        torch.testing.assert_close(fitted(given)(given), given, rtol=1e-4, atol=1e-4)


def test_the_transposed_operand_is_aligned_alike():
    x = some()
    rows, columns = fitted(x), fitted(x.mT, axis=-2)
    torch.testing.assert_close(columns.gamma, rows.gamma)
    torch.testing.assert_close(columns.beta, rows.beta)
    torch.testing.assert_close(columns(x.mT), rows(x).mT)
    assert columns(x.mT).shape == (4, HEADS, DIMENSIONS, 11)


def test_a_dimension_whose_normed_values_do_not_vary_keeps_the_average_gain():
    """All tokens are one vector: every normed value is constant, and nothing tells a gain."""
    x = torch.arange(1.0, 9.0).expand(2, HEADS, 5, DIMENSIONS)
    made = fitted(x)
    assert bool(made.gamma.isfinite().all())
    assert bool(made.beta.isfinite().all())
    torch.testing.assert_close(made(x), x, rtol=1e-4, atol=1e-4)


def test_zero_content_is_preserved():
    """DETR's first decoder layer: the content of all queries is 0, and so may be their projections."""
    x = torch.zeros(2, HEADS, 5, DIMENSIONS)
    assert torch.equal(fitted(x)(x), x)


def test_until_it_is_fitted_it_passes_all_on():
    made, x = alignment(), some()
    assert made(x) is x
    made.start_observing()
    assert not made.finish_observing(), "nothing was seen"
    assert made(x) is x


def test_values_that_are_not_finite_are_refused_by_name():
    made, x = alignment(), some()
    made.path = "model.decoder.q_alignment"
    made.start_observing()
    with pytest.raises(RunError, match=r"model\.decoder\.q_alignment: met values that are not finite"):
        made(torch.full_like(x, float("nan")))


def test_a_state_dict_keeps_it_on_and_off():
    x, on = some(), fitted(some())
    other = alignment()
    other.load_state_dict(on.state_dict())
    assert torch.equal(other(x), on(x))
    assert not torch.equal(other(x), x)
    other.load_state_dict(alignment().state_dict())
    assert other(x) is x


def test_a_copy_is_on_and_independent():
    x, on = some(), fitted(some())
    twin, before = copy.deepcopy(on), on(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.gamma.zero_()
    assert torch.equal(on(x), before)


def test_gradients_are_those_of_layer_norm_and_half_precision_stays():
    made = fitted(some())
    x, y = (some(seed=2).requires_grad_() for _ in range(2))
    made(x).square().sum().backward()
    (normed(y) * made.gamma.detach()[:, None] + made.beta.detach()[:, None]).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    assert bool(made.gamma.grad.any())
    assert bool(made.beta.grad.any())
    assert made(some().bfloat16()).dtype == torch.bfloat16


def test_exports_with_a_free_batch():
    made, x = fitted(some()), some(batch=3, tokens=7)
    free = {"x": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}}
    program = torch.export.export(made, (some(),), dynamic_shapes=free, strict=False)
    torch.testing.assert_close(program.module()(x), made(x))


@pytest.mark.parametrize("slot", ["weight", "input", "probs", "v"])
def test_a_slot_that_cannot_be_aligned_is_refused(slot):
    rule = {"op": ["linear", "attention"], slot: {"bits": 8, "align": True}}
    with pytest.raises(
        RecipeError, match=rf"rules\.0\.{slot}: align: only q and k are aligned; drop the key"
    ):
        recipe_from_dict({"schema": 1, "rules": [rule]}, source="mine.yaml")


def test_it_is_on_or_off():
    with pytest.raises(RecipeError, match=r"rules\.0\.q\.align: yes is not true or false"):
        recipe_from_dict(
            {"schema": 1, "rules": [{"op": "attention", "q": {"bits": 8, "align": "yes"}}]}, source="m"
        )
    assert QuantFormat.__dataclass_fields__["align"].default is False
