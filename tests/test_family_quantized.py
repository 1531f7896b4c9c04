"""Under 4-4-4 nothing is bypassed: by the graphs, by a run watched below PyTorch's functions, by the plan."""

import copy
from typing import Any

import pytest
import torch
from attention_graphs import dense_operands, record_calls, sampled_operands
from family_models import NAMES, SIZE, TRAINABLE, Ready, facts_of, ready, set_mode
from quantized_detectors import inputs
from torch import nn
from torch.nn import functional as F
from watched_products import Product, Seen, constant, seen, watched

from qdetr_cli.attention import QuantAttention, QuantDeformable
from qdetr_cli.rewrite import set_enabled

FLOAT_PRODUCTS = {  # class -> why a product that is no layer and no attention is not quantized
    "DFineIntegral": "the expected distance over 33 bins: coordinates stay float",
    "Deimv2Integral": "the expected distance over 33 bins: coordinates stay float",
}

names = pytest.mark.parametrize("name", NAMES)


def without_loss(made: Ready) -> nn.Module:
    """The fake-quant model; the loss, which multiplies matrices too, is no part of what is quantized."""
    model: Any = copy.deepcopy(made.model)
    model.loss_function = lambda *args, **kwargs: (None, None, None)
    return model


def multiplied(model: nn.Module, made: Ready, kind: str, *, seed: int = 1, training: bool) -> list[Product]:
    """Every product of one forward pass on other images than those of the calibration."""
    given = inputs(kind, 3, SIZE)
    given["pixel_values"] = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    set_mode(model, training)
    torch.manual_seed(7)  # denoising queries
    samplers = tuple(each.path for each in made.facts.attentions if each.op == "deformable")
    with watched(model, samplers) as watch:
        model(**given)
    return watch.products


def run(name: str, model: nn.Module, *, training: bool) -> tuple[list[Seen], list[Product]]:
    """What the plan has a word on, and what it does not know and depends on the image."""
    made = ready(name)
    kind = "labels" if training else "mask"
    found, strange = seen(model, made.plan, multiplied(model, made, kind, training=training))
    _, again = seen(model, made.plan, multiplied(model, made, kind, seed=2, training=training))
    assert len(strange) == len(again)
    return found, [one for one, other in zip(strange, again, strict=True) if not constant(one, other)]


@pytest.mark.parametrize(
    ("name", "training"), [(name, False) for name in NAMES] + [(name, True) for name in TRAINABLE]
)
def test_every_product_has_operands_on_their_grids(name: str, training: bool) -> None:
    """In training with padding and, where the family has them, denoising queries or groups of queries."""
    made = ready(name)
    model = without_loss(made)
    found, strange = run(name, model, training=training)
    planned = {(each.path, slot.slot) for each in made.plan.modules for slot in each.slots if slot.format}
    reasons = {each.path: each.reason for each in made.plan.modules}
    assert [each for each in found if each.quantized and not each.on_grid] == []
    assert {(each.path, each.slot) for each in found if each.quantized} == planned
    assert all(reasons[each.path] for each in found if not each.quantized)
    assert {type(model.get_submodule(each.path)).__name__ for each in strange} <= FLOAT_PRODUCTS.keys()


@names
def test_the_watch_sees_what_is_not_quantized(name: str) -> None:
    """The proof above has teeth: with its quantizers off, not one operand lies on its grid by chance."""
    made = ready(name)
    model = without_loss(made)
    set_enabled(model, None, False)
    found, _ = run(name, model, training=False)
    assert not [each for each in found if each.on_grid and not each.zero]


@pytest.mark.parametrize("slot", ["weight", "input", "probs"])
@pytest.mark.parametrize("name", ["detr", "d_fine", "lw_detr"])
def test_one_quantizer_that_is_skipped_is_found(name: str, slot: Any) -> None:
    """The watch names it, and nothing else."""
    made, model = ready(name), without_loss(ready(name))
    path = next(each.path for each in reversed(made.plan.modules) if each.format(slot))
    quantizer: Any = model.get_submodule(f"{path}.{slot}_quantizer")
    quantizer.enabled = False
    found, _ = seen(model, made.plan, multiplied(model, made, "mask", training=False))
    assert {(each.path, each.slot) for each in found if each.quantized and not each.on_grid} == {(path, slot)}


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_images_matter_to_the_model(name: str) -> None:
    """Else a run proves little: a random network may forget its image on the way to the attention."""
    reference = facts_of(name)[0].eval()
    images = [torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    with torch.no_grad():
        first, second = (reference(pixel_values=pixels).logits for pixels in images)
    assert (first - second).abs().max() > 1e-3


@names
def test_graphs_multiply_nothing_that_no_quantizer_made(name: str) -> None:
    """Dense attention as it runs, each way it is called; deformable attention exported again."""
    made = ready(name)
    dense = [each.path for each in made.facts.attentions if each.op == "attention"]
    for path in dense:
        attention = made.model.get_submodule(path)
        assert isinstance(attention, QuantAttention)
        assert attention.captured
        for captured in attention.captured.values():
            assert list(dense_operands(captured.graph)) == [
                ("q_quantizer", "k_quantizer"),
                ("probs_quantizer", "v_quantizer"),
            ]
    deformable = [each.path for each in made.facts.attentions if each.op == "deformable"]
    kinds = {type(made.model.get_submodule(path)): path for path in deformable}  # one of each is exported
    model = copy.deepcopy(made.model)
    for path, call in record_calls(model, list(kinds.values()), **inputs("mask", 2, SIZE)).items():
        attention = model.get_submodule(path)
        assert isinstance(attention, QuantDeformable)
        assert set(sampled_operands(attention, call)) == {
            ("value", "v_quantizer"),
            ("weights", "probs_quantizer"),
        }


@names
def test_no_attention_and_no_layer_is_left_out_unless_the_plan_says_why(name: str) -> None:
    made = ready(name)
    attentions = [each for each in made.plan.modules if each.op in ("attention", "deformable")]
    assert attentions
    assert all(slot.format is not None and slot.bits == 4 for each in attentions for slot in each.slots)
    assert not [note for note in made.facts.notes if "attention" in note]
    planned = {path: each for each in made.plan.modules for path in (each.path, *each.aliases)}
    for path, layer in made.model.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            module = planned[path]
            assert bool(module.reason) == module.is_float
            quantized = [key for key, _ in layer.named_children()]
            assert sorted(quantized) == sorted(
                f"{slot.slot}_quantizer" for slot in module.slots if slot.format
            )


def test_a_bypass_is_found() -> None:
    """A weight that is used without calling its layer: no hook and no quantizer of its own sees that."""
    made, model = ready("detr"), without_loss(ready("detr"))
    path = "model.decoder.layers.0.mlp"
    mlp: Any = model.get_submodule(path)

    class Bypassing(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(F.relu(F.linear(x, self.fc1.weight, self.fc1.bias)))

    mlp.__class__ = Bypassing
    found, strange = run("detr", model, training=False)
    assert {each.path for each in strange} == {path}
    planned = {(each.path, slot.slot) for each in made.plan.modules for slot in each.slots if slot.format}
    unseen = planned - {(each.path, each.slot) for each in found}
    assert unseen == {(f"{path}.fc1", "weight"), (f"{path}.fc1", "input")}
