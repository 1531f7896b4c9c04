"""What is rounded again for the backward pass: the same gradients as by keeping it, and it is not kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
from family_models import batch, ready, set_mode
from torch import Tensor, nn

from qdetr_cli import attention, layers
from qdetr_cli.compiled import compiled_kernels
from qdetr_cli.families import family_of
from qdetr_cli.losses import detection_loss
from qdetr_cli.recipe import QuantFormat
from qdetr_cli.recomputed import _alive, recomputed, remember

DETECTORS = ("conditional_detr", "d_fine", "deimv2", "rt_detr_v2")  # dense, sampled, without a CNN, looked up
INPUT = QuantFormat(bits=4, symmetric=False, unsigned=False, per="tensor", quantizer="lsq", init="mse")
WEIGHT = QuantFormat(bits=4, symmetric=True, unsigned=False, per="channel", quantizer="lsq", init="mse")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def gradients(name: str) -> dict[str, Tensor]:
    model = copy.deepcopy(ready(name, "w4a4").model)
    set_mode(model, True)
    torch.manual_seed(0)
    detection_loss(model, family_of(model), batch(), auxiliary=True).total.backward()
    return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_learns_the_same_to_the_last_bit(name, monkeypatch):
    found = gradients(name)
    for module in (layers, attention):
        monkeypatch.setattr(module, "recomputed", nullcontext)
    kept = gradients(name)
    assert found.keys() == kept.keys()
    assert not [key for key in kept if not torch.equal(kept[key], found[key])]


def is_kept(node: torch.autograd.graph.Node, name: str) -> bool:
    """Whether what a node saved is one tensor, however often it is asked for."""
    first, second = (getattr(node, f"_saved_{name}") for _ in range(2))
    assert torch.equal(first, second)
    return first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("compiled", [False, True], ids=["blocks", "compiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_keeps_neither_its_input_nor_its_weight_on_the_grid(layout, compiled):
    torch.manual_seed(0)
    layer = layers.quantized_layer(nn.Conv2d(6, 4, 3), weight=WEIGHT, input=INPUT)
    x = torch.randn(5, 6, 11, 13).to(memory_format=LAYOUTS[layout]).requires_grad_()
    layer.calibrate_weight()
    layer.input_quantizer.start_observing()
    layer(x)
    layer.input_quantizer.finish_observing()
    with compiled_kernels(compiled):
        node = layer(x).grad_fn
        assert [is_kept(node, name) for name in ("input", "weight")] == [False, False]
        for name, of, value in (
            ("input", layer.input_quantizer, x),
            ("weight", layer.weight_quantizer, layer.weight),
        ):
            saved = getattr(node, f"_saved_{name}")
            assert torch.equal(saved, of.dequantize(of.integers(value.detach())))
            assert saved.stride() == value.stride()


def product(y: Tensor) -> torch.autograd.graph.Node:
    with recomputed():
        return (y * torch.ones_like(y, requires_grad=True)).grad_fn


def test_views_are_computed_again_as_views():
    x = torch.arange(12.0, requires_grad=True)
    y = x * 1
    remember(y, lambda: torch.arange(12.0))
    node = product(y.view(3, 4)[1:].t())
    assert not is_kept(node, "self")
    assert torch.equal(node._saved_self, torch.tensor([[4.0, 8], [5, 9], [6, 10], [7, 11]]))


def test_what_was_changed_in_place_or_is_gone_is_kept():
    x = torch.arange(12.0, requires_grad=True)
    changed = x * 1
    remember(changed, lambda: pytest.fail("computed again"))
    changed.add_(1)
    assert is_kept(product(changed), "self")
    gone = x * 1
    remember(gone, lambda: pytest.fail("computed again"))
    del gone
    assert is_kept(product(x * 2), "self")


def test_nothing_is_noted_without_gradients():
    layer = layers.quantized_layer(nn.Linear(3, 2), weight=WEIGHT, input=None)
    layer.calibrate_weight()
    before = len(_alive)
    with torch.no_grad():
        y = layer.operands(torch.zeros(1, 3))
    assert len(_alive) == before
    assert y[1].shape == (2, 3)
