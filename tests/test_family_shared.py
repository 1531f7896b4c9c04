"""Layers that a model calls more than once, or knows by several names: one weight, one set of quantizers."""

import copy
import json
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import SIZE, batch, facts_of, set_mode
from quantized_detectors import calibrated, inputs
from safetensors import safe_open
from torch import Tensor, nn

from qdetr_cli.families import family_of
from qdetr_cli.losses import detection_loss
from qdetr_cli.manifest import WEIGHTS, Manifest, load_weights, save_checkpoint
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import recipe_from_dict
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.trace import LayerFacts

LINEAR = {"op": "linear", "weight": {"bits": 8}, "input": {"bits": 8, "symmetric": False, "init": "minmax"}}
TIED = (  # heads that are known by several names
    *("deformable_detr", "deformable_detr-box_refine", "deformable_detr, two-stage", "dab-detr"),
    *("rt_detr_v2", "d_fine", "deimv2", "deimv2-lite"),
)
REPEATED = (  # heads of positions that every decoder layer calls
    *("dab-detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deimv2-lite"),
)
# In DETR by auxiliary losses; two-stage Deformable-DETR detaches what its box heads would learn twice.
TAUGHT_TWICE = (
    *("detr", "deformable_detr", "deformable_detr-box_refine", "dab-detr"),
    *("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deimv2-lite"),
)

tied = pytest.mark.parametrize("name", TIED)
repeated = pytest.mark.parametrize("name", REPEATED)


def linear_layers(name: str) -> list[LayerFacts]:
    """The linear layers that a forward pass calls."""
    return [each for each in facts_of(name)[1].layers if each.op == "linear" and each.calls]


@cache
def linear_model(name: str) -> nn.Module:
    """The model with every Linear at 8 bits, those of queries too, calibrated. Not to be changed."""
    reference, facts = facts_of(name)
    model = copy.deepcopy(reference)
    rewrite(model, make_plan(recipe_from_dict({"schema": 1, "rules": [LINEAR]}, source="test"), facts), facts)
    return calibrated(model, inputs("pixels", 4, SIZE))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deformable_detr", ("class_embed.0", "bbox_embed.0")),
        ("deformable_detr-box_refine", ("model.decoder.bbox_embed.0", "model.decoder.bbox_embed.1")),
        ("deformable_detr, two-stage", ("model.decoder.class_embed.0", "model.decoder.bbox_embed.1")),
        ("dab-detr", ("model.decoder.bbox_embed",)),
        ("rt_detr_v2", ("model.decoder.class_embed.1", "model.decoder.bbox_embed.0")),
        ("d_fine", ("model.decoder.class_embed.1", "model.decoder.bbox_embed.1")),
        ("deimv2-lite", ("model.decoder.bbox_embed.0",)),
    ],
    ids=str,
)
def test_the_graph_facts_know_tied_heads(name: str, heads: tuple[str, ...]) -> None:
    known = {each.path.partition(".layers.")[0] for each in linear_layers(name) if each.aliases}
    assert set(heads) <= known


@tied
def test_a_layer_with_several_names_is_swapped_once(name: str) -> None:
    model = linear_model(name)
    for layer in linear_layers(name):
        assert all(model.get_submodule(alias) is model.get_submodule(layer.path) for alias in layer.aliases)
    paths = [path for path in quantizers(model) if path.endswith("weight_quantizer")]
    weights = {id(model.get_parameter(path.removesuffix("_quantizer"))) for path in paths}
    assert len(weights) == len(paths), "one quantizer for each weight"


@repeated
def test_its_range_covers_every_call(name: str) -> None:
    """Naive: calibrated on the first call, whose values another call may leave far behind."""
    model = copy.deepcopy(linear_model(name)).eval()
    ranges: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def note(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ranges[path].append((min(0.0, float(args[0].min())), max(0.0, float(args[0].max()))))

    for quantizer in quantizers(model).values():
        quantizer.enabled = quantizer.path.endswith("weight_quantizer")
    layers = [layer for layer in linear_layers(name) if layer.calls > 1]
    assert layers
    for layer in layers:
        model.get_submodule(layer.path).register_forward_pre_hook(partial(note, layer.path))
    with torch.no_grad():
        model(**inputs("pixels", 4, SIZE))
    for layer in layers:
        calls = ranges[layer.path]
        assert len(calls) == layer.calls
        low, high = min(low for low, _ in calls), max(high for _, high in calls)
        step = float(model.get_parameter(f"{layer.path}.input_quantizer.step").detach())
        assert step == pytest.approx((high - low) / 255, rel=1e-5), layer.path
    apart = [layer.path for layer in layers if len(set(ranges[layer.path])) > 1]
    assert len(apart) == len(layers), "the calls differ, so that the first alone would not do"


class Apart(nn.Module):
    """As many copies of a layer as it has calls, each called once."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(calls))
        self.next = 0

    def forward(self, x: Tensor) -> Any:
        self.next += 1
        return self.copies[self.next - 1](x)


@pytest.mark.parametrize("name", TAUGHT_TWICE)
def test_its_gradient_is_the_sum_over_all_uses(name: str) -> None:
    """Weight, bias, steps and offset, with denoising and auxiliary losses: against a copy for each call."""
    model, calls = copy.deepcopy(linear_model(name)), Counter[str]()

    def count(path: str, *_: Any) -> None:
        calls[path] += 1

    for layer in linear_layers(name):
        model.get_submodule(layer.path).register_forward_hook(partial(count, layer.path))
    learn(model)
    layers = [layer for layer in linear_layers(name) if calls[layer.path] > 1]
    apart = copy.deepcopy(linear_model(name))
    for layer in layers:
        copies = Apart(apart.get_submodule(layer.path), calls[layer.path])
        for path in (layer.path, *layer.aliases):
            apart.set_submodule(path, copies)
    learn(apart)
    several = 0
    for layer in layers:
        shared, parts = model.get_submodule(layer.path), apart.get_submodule(layer.path).copies  # type: ignore[union-attr]
        for key, parameter in shared.named_parameters():
            gradients = [each.get_parameter(key).grad for each in parts]  # type: ignore[union-attr]
            got = [each for each in gradients if each is not None]
            several += len([each for each in got if each.any()]) > 1
            total = torch.stack(got).sum(0) if got else torch.zeros_like(parameter)
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(own, total, rtol=1e-3, atol=1e-5)
    assert several, "at least one parameter learns from several uses"


def learn(model: nn.Module) -> None:
    """One backward pass in training, with the same denoising queries each time."""
    set_mode(model, True)
    torch.manual_seed(5)
    detection_loss(model, family_of(model), batch(), auxiliary=True).total.backward()


@tied
def test_it_is_saved_once_and_comes_back_shared(name: str, tmp_path: Path) -> None:
    model = linear_model(name)
    save_checkpoint(tmp_path / "saved", model, manifest(name))
    with safe_open(tmp_path / "saved" / WEIGHTS, framework="pt") as file:
        written, aliases = set(file.keys()), json.loads(file.metadata()["aliases"])
    for layer in linear_layers(name):
        tensors = [key for key in written if key.startswith(f"{layer.path}.")]
        assert tensors
        for alias in layer.aliases:
            assert not [key for key in written if key.startswith(f"{alias}.")]
            assert {key for key in aliases if key.startswith(f"{alias}.")} == {
                alias + key.removeprefix(layer.path) for key in tensors
            }
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    load_weights(tmp_path / "saved", other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def manifest(name: str) -> Manifest:
    return Manifest(
        kind="fake-quant",
        family=name,
        recipe={},
        plan={},
        facts={},
        class_names={},
        processor={},
        config={},
        source="",
        versions={},
        metrics=None,
    )
