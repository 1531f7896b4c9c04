"""Compiled kernels against the uncompiled ones; and going on without a compiler."""

import pytest
import torch

from qdetr_cli import compiled
from qdetr_cli.compiled import compiled_kernels
from qdetr_cli.fake_quant import fake_quantize
from qdetr_cli.recipe import QuantFormat

CASES = {  # shape, axis, symmetric, channels last
    "features": ((3, 5, 7, 9), None, False, False),
    "features, channels last": ((3, 5, 7, 9), None, False, True),
    "kernels": ((8, 5, 3, 3), 0, True, False),
    "heads": ((2, 4, 30, 16), 1, False, False),
    "sampling weights": ((2, 30, 8, 4), 2, True, False),
}


def outcome(case: str, dtype: torch.dtype, *, on: bool) -> list[torch.Tensor]:
    """The output, and the gradients of x, step and offset, with steps and offsets beyond their bounds too."""
    shape, axis, symmetric, last = CASES[case]
    generator = torch.Generator().manual_seed(0)
    channels = 1 if axis is None else shape[axis]
    format = QuantFormat(
        bits=3, symmetric=symmetric, unsigned=axis == 2, per="tensor", quantizer="lsq", init="mse"
    )
    memory = torch.channels_last if last else torch.contiguous_format
    x, g = (torch.randn(shape, generator=generator).to(dtype, memory_format=memory) for _ in range(2))
    x.requires_grad_()
    step = (0.1 + torch.rand(channels, generator=generator)).requires_grad_()
    step.data[0] = -1.0 if channels > 1 else step.data[0]  # below the floor
    offset = None if symmetric else torch.linspace(-6, 5, channels).add(0.3).requires_grad_()
    with compiled_kernels(on) as really:
        assert really == on
        y = fake_quantize(x, step, offset, format, axis=axis, scale=0.01)
        y.backward(g)
    return [
        each
        for each in (y.detach(), x.grad, step.grad, None if offset is None else offset.grad)
        if each is not None
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_compiled_is_uncompiled(case, dtype):
    """Values and their gradients to the last bit; sums up to the order of addition."""
    expected, found = (outcome(case, dtype, on=on) for on in (False, True))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for mine, theirs in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-2)


def test_it_is_off_by_itself_and_off_again():
    x = torch.zeros(3)
    assert not compiled.takes(x)
    with compiled_kernels(True):
        assert compiled.takes(x)
        assert not compiled.takes(x.double())
        assert not compiled.takes(x[:0])
    assert not compiled.takes(x)


def test_without_a_compiler_it_is_said_and_goes_on(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler found\nand more")

    compiled._works.cache_clear()
    monkeypatch.setattr(compiled, "round_to_grid", broken)
    context = compiled_kernels(True)
    with pytest.warns(UserWarning, match=r"no compiler found\); fake quantization runs uncompiled"):
        assert not context.__enter__()
    assert not compiled.takes(torch.zeros(3))
    compiled._works.cache_clear()
