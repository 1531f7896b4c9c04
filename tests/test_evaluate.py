"""Evaluation and the ladder, on a data set whose objects are the float model's own findings: its AP is 1."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from quantized_detectors import float_model
from tiny_runs import PADDED, write_coco

from qdetr_cli.calibrate import calibrate
from qdetr_cli.data import ImageSet, collate, open_data
from qdetr_cli.evaluate import REST, Bench, detect, evaluate, ladder, ladder_groups, only
from qdetr_cli.families import family_of
from qdetr_cli.plan import make_plan
from qdetr_cli.processors import Processor
from qdetr_cli.recipe import Calibrate, load_recipe
from qdetr_cli.rewrite import quantizers, rewrite, set_enabled
from qdetr_cli.trace import trace

CPU = torch.device("cpu")
CLASSES = ("zebra", "yak", "fox")  # of the tiny detectors


class World:
    """A float detector, its 3-bit twin with plan, and a bench on which the float one is right."""

    def __init__(self, folder):
        data = open_data(write_coco(folder), split="val")
        processor = Processor.from_config(PADDED, Processor(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
        images = ImageSet(data, processor, (0, 1), augment=None, seed=0)
        self.float = float_model("detr")
        self.family = family_of(self.float)
        batch = collate([images[index] for index in range(len(images))])
        found = detect(self.float, self.family, batch, (0, 1, 2))
        records = [
            replace(
                record,
                boxes=each.boxes.clip(0, [record.width, record.height] * 2),
                labels=each.labels,
                difficult=np.zeros(len(each.labels), dtype=bool),
                crowd=np.zeros(len(each.labels), dtype=bool),
                area=np.full(len(each.labels), 900.0),
            )
            for record, each in zip(data.records, found, strict=True)
        ]
        data = replace(data, class_names=CLASSES, category_ids=(1, 2, 3), records=tuple(records))
        self.images = ImageSet(data, processor, (0, 1, 2), augment=None, seed=0)
        self.bench = Bench(data=data, images=self.images, class_index=(0, 1, 2), batch_size=2)
        self.model = copy.deepcopy(self.float)
        facts = trace(self.model, self.family, (64, 64))
        self.plan = make_plan(load_recipe("w3a3"), facts)
        rewrite(self.model, self.plan, facts)
        calibrate(self.model, self.images, Calibrate(images=3), device=CPU)

    def measured(self, model):
        return evaluate(model, self.family, self.bench, device=CPU)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def rungs(world):
    return ladder(world.model, world.family, world.plan, world.bench, device=CPU)[0]


def test_the_float_model_finds_its_own_objects_and_low_bits_lose(world):
    assert world.measured(world.float).ap == 1.0
    assert world.measured(world.model).ap < 0.9


def test_the_float_rung_is_the_model_with_quantizers_off(world, rungs):
    set_enabled(world.model, None, False)
    off = world.measured(world.model)
    set_enabled(world.model, None, True)
    assert rungs[0].name == "float"
    assert rungs[0].metrics == off
    assert rungs[0].metrics.ap == 1.0


def test_the_last_cumulative_rung_is_the_plain_evaluation(world, rungs):
    last = [rung for rung in rungs if rung.kind == "cumulative"][-1]
    assert last.metrics == world.measured(world.model)
    assert last.metrics.ap < rungs[0].metrics.ap
    assert last.groups == tuple(ladder_groups(world.plan))


def test_rungs_come_as_promised(world, rungs):
    names = list(ladder_groups(world.plan))
    assert names == ["backbone", "encoder", "decoder attention", "MLPs"]
    assert [rung.name for rung in rungs] == [
        "float",
        *(f"+ {name}" for name in names),
        *(f"only {name}" for name in names),
        *(f"all but {name}" for name in names),
    ]
    by_name = {rung.name: rung for rung in rungs}
    assert by_name["only encoder"].groups == ("encoder",)
    assert by_name["all but encoder"].groups == ("backbone", "decoder attention", "MLPs")
    assert by_name["+ backbone"].metrics == by_name["only backbone"].metrics
    assert by_name["all but MLPs"].metrics == by_name["+ decoder attention"].metrics


def test_each_image_is_read_once_for_all_rungs(world):
    class Counted(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return len(world.images)

        def __getitem__(self, index):
            self.reads += 1
            return world.images[index]

    counted, done = Counted(), []
    bench = replace(world.bench, images=counted)
    ladder(world.model, world.family, world.plan, bench, device=CPU, advance=done.append)
    assert counted.reads == sum(done) == 3


def test_only_switches_the_named_groups_and_puts_all_back(world):
    groups = ladder_groups(world.plan)
    with only(world.model, groups, frozenset({"encoder"})):
        on = {path.rpartition(".")[0] for path, each in quantizers(world.model).items() if each.enabled}
    assert on == set(groups["encoder"]) & {p.rpartition(".")[0] for p in quantizers(world.model)}
    with pytest.raises(ZeroDivisionError), only(world.model, groups, frozenset()):
        assert not any(each.enabled for each in quantizers(world.model).values())
        1 / 0  # noqa: B018
    assert all(each.enabled for each in quantizers(world.model).values())


def test_quantized_modules_in_no_group_form_one_at_the_end(world):
    plan = replace(world.plan, ladder={"encoder": world.plan.ladder["encoder"], "empty": ()})
    groups = ladder_groups(plan)
    assert list(groups) == ["encoder", REST]
    assert set(groups[REST]).isdisjoint(groups["encoder"])
    quantized = {module.path for module in plan.modules if not module.is_float}
    assert quantized <= {*groups[REST], *groups["encoder"]}


def test_classes_that_the_data_lacks_are_left_out_and_the_rest_renumbered(world):
    batch = collate([world.images[0]])
    (every,) = detect(world.float, world.family, batch, (0, 1, 2))
    (some,) = detect(world.float, world.family, batch, (2, 0))
    kept = every.labels != 1
    assert len(every.labels) > 0
    np.testing.assert_array_equal(some.labels, np.where(every.labels[kept] == 2, 0, 1))
    np.testing.assert_array_equal(some.boxes, every.boxes[kept])
