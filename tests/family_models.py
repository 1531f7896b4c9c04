"""A tiny detector of each family under a shipped recipe, calibrated, for tests; each is made once."""

import copy
from dataclasses import dataclass
from functools import cache

import torch
from quantized_detectors import calibrated, float_model, inputs
from tiny_detectors import CONFIGS
from torch import Tensor, nn

from qdetr_cli.data import Batch
from qdetr_cli.families import Family, family_of
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import rewrite
from qdetr_cli.trace import GraphFacts, trace

ALIVE = 2**0.5  # gain of the random weights: with less, ReLU networks of this size forget their image
SIZE = (64, 96)
NAMES = tuple(CONFIGS)
TRAINABLE = tuple(name for name in NAMES if family_of(CONFIGS[name]["model_type"]).trainable)
FAMILIES = (  # one of each, without the variants of backbone and decoder, which share their family's loss
    *(name for name in TRAINABLE if name == CONFIGS[name]["model_type"]),
    "deformable_detr, two-stage",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A float model, and the same under a recipe, calibrated. None of it is to be changed."""

    family: Family
    float: nn.Module
    model: nn.Module
    plan: Plan
    facts: GraphFacts


@cache
def facts_of(name: str) -> tuple[nn.Module, GraphFacts]:
    """The float model, without dropout, and what its graph says."""
    model = float_model(name, dropout=0.0, gain=ALIVE)
    return model, trace(model, family_of(model), SIZE)


def put_under(name: str, recipe: str, model: nn.Module) -> Plan:
    """Rewrite a model of this structure under a shipped recipe; its plan."""
    plan = make_plan(load_recipe(recipe), facts_of(name)[1])
    rewrite(model, plan, facts_of(name)[1])
    return plan


@cache
def ready(name: str, recipe: str = "w4a4_attn4") -> Ready:
    """The model of `name` in tiny_detectors under a shipped recipe, calibrated on random images."""
    reference, facts = facts_of(name)
    model = copy.deepcopy(reference)
    plan = put_under(name, recipe, model)
    calibrated(model, inputs("pixels", 4, SIZE))
    return Ready(family=family_of(model), float=reference, model=model, plan=plan, facts=facts)


def set_mode(model: nn.Module, training: bool) -> None:
    """Training or eval mode; statistics of batch norms stay in both."""
    for module in model.modules():
        module.training = training and not isinstance(module, nn.BatchNorm2d)


def batch(objects: tuple[int, ...] = (2, 1, 0), size: tuple[int, int] = SIZE) -> Batch:
    """Noise with as many objects in each image as said, padded but for the first image."""
    given = inputs("mask", len(objects), size)
    generator = torch.Generator().manual_seed(3)
    labels: list[dict[str, Tensor]] = []
    for count in objects:
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
        labels.append({"class_labels": torch.randint(0, 3, (count,), generator=generator), "boxes": boxes})
    return Batch(
        pixel_values=given["pixel_values"],
        pixel_mask=given["pixel_mask"],
        labels=labels,
        image_ids=list(range(len(objects))),
        sizes=torch.tensor([size] * len(objects)),
    )
