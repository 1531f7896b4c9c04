"""Learning rates, the moving average and the order of data, each against values worked out by hand."""

import pytest
import torch
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.recipe import Train
from qdetr_cli.schedule import EpochSampler, MovingAverage, freeze, lr_scale


class Net(nn.Module):
    """Named as detectors are: `model.backbone` is the backbone."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"backbone": nn.Linear(2, 3)})
        self.head = nn.Linear(3, 1)
        self.step = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize(
    ("train", "step", "expected"),
    [
        (Train(warmup_steps=4), 0, 0.25),
        (Train(warmup_steps=4), 3, 1.0),
        (Train(warmup_steps=0), 0, 1.0),
        (Train(warmup_steps=0), 50, 0.5),
        (Train(schedule="step", step_at=0.8), 79, 1.0),
        (Train(schedule="step", step_at=0.8), 80, 0.1),
        (Train(schedule="constant"), 99, 1.0),
    ],
    ids=str,
)
def test_lr_scale(train, step, expected):
    assert lr_scale(train, step, 100) == pytest.approx(expected)


def test_shared_parameters_freeze_under_each_of_their_names():
    for pattern in ("class_embed.*", "model.decoder.class_embed.*"):
        model = load_config_model(tiny_config("d_fine"), None).model
        assert freeze(model, (pattern,)) == ()
        assert not model.class_embed[1].weight.requires_grad


def test_freeze_stops_gradients_and_names_what_matched_nothing():
    net = Net()
    assert freeze(net, ("model.backbone", "neck.*")) == ("neck.*",)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        "model.backbone.weight",
        "model.backbone.bias",
    ]


def test_moving_average_by_hand():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average = MovingAverage(net, decay=0.9)
    net.weight.data.fill_(1.0)
    average.update(net)  # decay min(0.9, 2/11)
    assert average.tensors["weight"].item() == pytest.approx(1 - 2 / 11)
    average.updates = 10_000
    net.weight.data.fill_(0.0)
    average.update(net)
    assert average.tensors["weight"].item() == pytest.approx(0.9 * (1 - 2 / 11))


def test_moving_average_copies_buffers():
    net = Net()
    average = MovingAverage(net, decay=0.99)
    net.count.fill_(7)
    average.update(net)
    assert average.tensors["count"].item() == 7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_an_epoch_without_overlap(world):
    parts = [
        [
            index
            for batch in EpochSampler(50, 4, seed=1, epoch=2, skip=0, rank=rank, world=world)
            for index in batch
        ]
        for rank in range(world)
    ]
    together = [index for part in parts for index in part]
    assert len(set(together)) == len(together) == 50 // (4 * world) * 4 * world
    assert len({len(part) for part in parts}) == 1


def test_skip_goes_on_where_the_epoch_was():
    whole = list(EpochSampler(50, 4, seed=1, epoch=2, skip=0, rank=0, world=1))
    rest = EpochSampler(50, 4, seed=1, epoch=2, skip=5, rank=0, world=1)
    assert list(rest) == whole[5:]
    assert len(rest) == len(whole) - 5


def test_epochs_differ_and_seeds_differ():
    def first(seed: int, epoch: int) -> list[int]:
        return next(iter(EpochSampler(50, 8, seed=seed, epoch=epoch, skip=0, rank=0, world=1)))

    assert len({tuple(first(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_fewer_images_than_a_batch_still_make_one():
    (batch,) = EpochSampler(3, 16, seed=0, epoch=0, skip=0, rank=0, world=1)
    assert sorted(batch) == [0, 1, 2]
