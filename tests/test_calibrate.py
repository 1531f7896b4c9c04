"""Calibration on tiny detectors: everything gets a range, from unpadded images, the same each time."""

import copy

import pytest
import torch
from quantized_detectors import float_model
from tiny_runs import PADDED, SQUASHED, SQUASHING, write_coco

from qdetr_cli.calibrate import calibrate, passes
from qdetr_cli.data import DetectionData, ImageSet, open_data
from qdetr_cli.errors import DataError
from qdetr_cli.families import family_of
from qdetr_cli.plan import make_plan
from qdetr_cli.processors import Processor
from qdetr_cli.recipe import Calibrate, load_recipe
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.trace import trace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DetectionData:
    root = write_coco(tmp_path_factory.mktemp("coco"), [(80, 60), (60, 90), (64, 64), (80, 60), (90, 60)])
    return open_data(root, split="train")


def image_set(data: DetectionData, name: str = "detr") -> ImageSet:
    config = SQUASHED if name in SQUASHING else PADDED
    processor = Processor.from_config(config, Processor(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
    return ImageSet(data, processor, (0, 1), augment=None, seed=0)


def uncalibrated(name: str) -> torch.nn.Module:
    model = float_model(name)
    family = family_of(model)
    facts = trace(model, family, (64, 64))
    rewrite(model, make_plan(load_recipe("w4a4_attn4"), facts), facts)
    return model


@pytest.fixture(scope="module")
def detr() -> torch.nn.Module:
    return uncalibrated("detr")


def steps(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {path: each.step.detach().clone() for path, each in quantizers(model).items()}


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "rt_detr", "d_fine"])
def test_every_quantizer_gets_a_range(name, data, detr):
    model = copy.deepcopy(detr) if name == "detr" else uncalibrated(name)
    done: list[int] = []
    spec = Calibrate(images=4, batch_size=2)
    assert calibrate(model, image_set(data, name), spec, device=CPU, advance=done.append) == ()
    assert sum(done) == passes(model) * 4 == 8, "q and k are balanced first"
    assert quantizers(model)
    for path, quantizer in quantizers(model).items():
        assert bool(quantizer.calibrated), path
        assert bool((quantizer.step > 0).all()), path
        assert quantizer.enabled, path
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model.eval()(pixel_values=pixels)
    assert bool(torch.isfinite(outputs.logits).all())
    assert bool(torch.isfinite(outputs.pred_boxes).all())


def test_no_batch_holds_padding_and_each_image_is_seen_once_in_a_pass(data, detr):
    model, sizes = copy.deepcopy(detr), []

    def look(module, arguments, given):
        assert bool((given["pixel_mask"] == 1).all())
        sizes.append(tuple(given["pixel_values"].shape))

    model.register_forward_pre_hook(look, with_kwargs=True)
    calibrate(model, image_set(data), Calibrate(images=10, batch_size=2), device=CPU)
    assert sum(shape[0] for shape in sizes) == passes(model) * len(data.records)
    assert len({shape[2:] for shape in sizes}) > 1


def test_the_seed_chooses_the_images_and_the_same_seed_gives_the_same_steps(data, detr):
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(detr)
        calibrate(model, image_set(data), Calibrate(images=1, batch_size=1, seed=seed), device=CPU)
        found.append(steps(model))
    first, again, other = found
    assert all(torch.equal(step, again[path]) for path, step in first.items())
    assert any(not torch.equal(step, other[path]) for path, step in first.items())


def test_a_quantizer_that_sees_nothing_is_named(data, detr):
    model = copy.deepcopy(detr)
    silent = torch.nn.Module()
    silent.input_quantizer = copy.deepcopy(next(q for p, q in quantizers(model).items() if "input" in p))
    model.add_module("nobody", silent)
    assert calibrate(model, image_set(data), Calibrate(images=1), device=CPU) == ("nobody.input_quantizer",)
    assert bool((silent.input_quantizer.step > 0).all())


def test_a_split_without_images_is_refused(data, detr):
    images = image_set(data)
    images.data = DetectionData(
        **{f: getattr(data, f) for f in data.__dataclass_fields__ if f != "records"}, records=()
    )
    with pytest.raises(DataError, match="holds no image"):
        calibrate(detr, images, Calibrate(), device=CPU)
