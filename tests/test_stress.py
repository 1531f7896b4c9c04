"""Numbers under stress: whatever the batch and the precision, losses are finite and steps positive.

Everything that a training can add is on: teacher, all terms, auxiliary queries, every slot at 4 bits.
"""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from quantized_detectors import all_slots, calibrated
from tiny_batches import batch
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.data import Batch
from qdetr_cli.families import Family, family_of
from qdetr_cli.objective import Objective, clipped
from qdetr_cli.plan import make_plan
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import Distill, OneToMany, Oscillation, Term, Train, recipe_from_dict
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.schedule import MovingAverage
from qdetr_cli.trace import trace

FAMILIES = ("detr", "conditional_detr", "deformable_detr", "rt_detr", "d_fine")
LEARNED_QUERIES = ("detr", "conditional_detr")  # that auxiliary queries can be copies of
RECKLESS = {"lr": 3e-2, "backbone_lr": 3e-2, "quantizer_lr": 3e-2}
DISTILL = ("logits", "boxes", "memory", "co_attended", "foreground_queries")


@cache
def student(name: str, classes: int, queries: int) -> tuple[nn.Module, nn.Module, Family]:
    """A fake-quant model at 4 bits, calibrated, and the float model that it comes from. Not to be changed."""
    names = {index: str(index) for index in range(classes)}
    config = tiny_config(name) | {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    torch.manual_seed(0)
    reference = load_config_model(config | {"num_queries": queries}, None).model
    model, family = copy.deepcopy(reference), family_of(reference)
    facts = trace(model, family, (64, 96))
    rewrite(model, make_plan(recipe_from_dict(all_slots(facts), source="test"), facts), facts)
    return calibrated(model, {"pixel_values": batch().pixel_values}), reference, family


def objective(name: str, classes: int = 3, queries: int = 7, **options) -> Objective:
    """All that a training can add, on a copy of the student."""
    model, reference, family = (
        copy.deepcopy(each) if isinstance(each, nn.Module) else each
        for each in student(name, classes, queries)
    )
    doubled = OneToMany(copies=2) if name in LEARNED_QUERIES else None
    train = Train(terms={"iou_aware": Term()}, one_to_many=doubled, **options)
    distill = Distill(teacher="float", terms={each: Term(weight=0.5) for each in DISTILL})
    return Objective(model.train(), family, train, distill, teacher=reference, same_origin=True)


def with_boxes(*boxes: list[float]) -> Batch:
    label = {"class_labels": torch.zeros(len(boxes), dtype=torch.int64), "boxes": torch.tensor(boxes)}
    return replace(batch(), labels=[label, label])


def padded(rows: int) -> Batch:
    """The last rows of the first image are padding."""
    found = batch()
    mask, pixels = found.pixel_mask.clone(), found.pixel_values.clone()
    mask[0, -rows:] = 0
    pixels[0, :, -rows:] = 0
    return replace(found, pixel_mask=mask, pixel_values=pixels)


BATCHES = {
    "ordinary": batch(),
    "zero-size boxes": with_boxes([0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.3], [0.5, 0.5, 0.3, 0.0]),
    "boxes that are the whole image": with_boxes([0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]),
    "no objects": batch((0, 0)),
    "more objects than queries": batch((20, 0)),
    "one image": batch((2,)),
    "padding in half of the rows": padded(32),
    "an image that is all padding": padded(64),
    "black images": replace(batch(), pixel_values=torch.zeros(2, 3, 64, 96)),
    "huge pixels": replace(batch(), pixel_values=1e4 * torch.randn(2, 3, 64, 96)),
    "4000 pixels wide": batch((1,), (64, 4000)),
}


def check_step(
    goal: Objective, images: Batch, dtype: torch.dtype | None = None, *, gradients: bool = True
) -> None:
    """One step from loss to weights: all of it is finite, and all steps are positive after it."""
    learned = [each for part in (goal.model, goal.extras) for each in part.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    torch.manual_seed(0)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        loss, terms = goal(goal.model, images)
    assert {name: float(each) for name, each in terms.items() if not each.isfinite()} == {}
    if not gradients:
        return
    loss.backward()
    bad = [name for name, each in goal.model.named_parameters() if not finite(each.grad)]
    assert bad == []
    assert clipped(learned, 0.1)
    optimizer.step()
    assert [name for name, each in goal.model.named_parameters() if not finite(each)] == []
    check_steps(goal.model)


def finite(x: torch.Tensor | None) -> bool:
    return x is None or bool(x.isfinite().all())


def check_steps(model: nn.Module) -> None:
    bad = [path for path, each in quantizers(model).items() if not bool((each.grid().step > 0).all())]
    assert bad == []


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_batch_gives_finite_losses_and_gradients(name, case):
    # transformers' deformable encoder divides by the part of an image that is no padding
    divides = name == "deformable_detr" and case == "an image that is all padding"
    check_step(objective(name), BATCHES[case], gradients=not divides)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_gives_finite_losses_and_gradients(name):
    check_step(objective(name), BATCHES["padding in half of the rows"], torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_fp16_gives_finite_losses_and_gradients(name):
    """A random RT-DETR or D-FINE at 4 bits has layer norms of nearly constant features, each 300 times as
    steep: gradients that fit fp16 at no scale, which `train` says after some steps."""
    check_step(objective(name), batch(), torch.float16, gradients=name not in ("rt_detr", "d_fine"))


EXTREMES = [
    pytest.param(1, 1, id="one of each"),
    pytest.param(1000, 7, id="1000 classes"),
    pytest.param(1, 7, id="one class", marks=pytest.mark.slow),
    pytest.param(3, 1, id="one query", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("classes", "queries"), EXTREMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_number_of_classes_and_queries_gives_finite_losses_and_gradients(name, classes, queries):
    check_step(objective(name, classes=classes, queries=queries), batch(classes=classes))


def watch_grids(model: nn.Module) -> list[str]:
    """A list that grows by the path of each quantizer that gives something off its grid."""
    strays: list[str] = []

    def look(quantizer: FakeQuantizer, given: tuple, y: torch.Tensor) -> None:
        grid = quantizer.grid()
        number = (y.detach() / _along(grid.step, y, quantizer.axis)).round()
        low, high = grid.qmin, grid.qmax
        if grid.zero is not None:
            zero = _along(grid.zero, y, quantizer.axis)
            number = number + zero
        again = grid.dequantize(number.clamp(low, high), quantizer.axis)
        if not torch.equal(again, y.detach()):
            strays.append(quantizer.path)

    for each in quantizers(model).values():
        each.register_forward_hook(look)
    return strays


def _along(values: torch.Tensor, x: torch.Tensor, axis: int | None) -> torch.Tensor:
    return (
        values
        if axis is None
        else values.view([-1 if each == axis % x.dim() else 1 for each in range(x.dim())])
    )


@pytest.mark.parametrize("name", ["conditional_detr", "d_fine"])
def test_invariants_hold_over_random_steps_of_a_reckless_rate(name):
    """40 steps here; `python -m benchmarks.soak` makes 10,000 and more."""
    goal = objective(name, oscillation=Oscillation(start=0.5, end=0.1), **RECKLESS)
    model = goal.model
    average, strays = MovingAverage(model, 0.9), watch_grids(model)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    groups = [
        group for part in (model, goal.extras) for group in parameter_groups(part, goal.family, goal.train)
    ]
    learned = [each for group in groups for each in group["params"]]
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.AdamW(groups)
    for step in range(40):
        torch.manual_seed(step)
        images = batch((step % 3, (step + 1) % 4))
        loss, _ = goal(model, replace(images, pixel_values=torch.randn(2, 3, 64, 96)))
        loss.backward()
        assert clipped(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)
        decay = min(0.9, (2 + step) / (11 + step))
        for key, value in model.state_dict().items():
            moves = key in names
            expected[key] = expected[key] * decay + value * (1 - decay) if moves else value.clone()
        check_steps(model)
    assert strays == []
    for key, value in average.tensors.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
