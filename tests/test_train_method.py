"""Training with all that the method adds at once: it resumes bit for bit, and is measured quantized."""

import copy
import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_detectors import tiny_config
from torch import nn

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.calibrate import calibrate
from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.data import ImageSet, open_data
from qdetr_cli.metrics import measure
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.recipe import (
    Augment,
    Calibrate,
    Distill,
    OneToMany,
    Oscillation,
    Stage,
    Term,
    Train,
    recipe_from_dict,
)
from qdetr_cli.rewrite import quantizers, rewrite
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.signals import Interrupted
from qdetr_cli.trace import trace
from qdetr_cli.train import Trainer

CPU = torch.device("cpu")
ROLES = ["decoder.self_attention", "decoder.cross_attention"]
EIGHT = {"bits": 8}
RULES = [
    {"op": ["linear", "conv"], "weight": {"bits": 3}, "input": EIGHT},
    {
        "role": ROLES[1],
        "op": "attention",
        "q": EIGHT | {"align": True},
        "k": EIGHT,
        "probs": EIGHT,
        "v": EIGHT,
    },
]
TRAIN = Train(
    steps=6,
    batch_size=2,
    lr=5e-3,
    backbone_lr=5e-3,
    clip=1.0,
    ema=0.9,
    workers=0,
    augment=Augment(color=0.2),
    terms={"iou_aware": Term(weight=0.5)},
    stages=(Stage(until=0.3, roles=("backbone",)), Stage(until=0.6, slots=("weight",))),
    oscillation=Oscillation(start=0.2, end=0.1, momentum=0.3, after=0.3),
    one_to_many=OneToMany(copies=2, weight=0.5),
)
DISTILL = Distill(
    teacher="wide",
    fade=0.8,  # of six steps the last is without a teacher
    terms={
        name: Term(weight=0.2) for name in ("logits", "boxes", "foreground_queries", "co_attended", "memory")
    },
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=6, val=2, size=64)
    return open_data(folder / "voc", split="train")


@cache
def built(width: int) -> Detector:
    torch.manual_seed(0)
    classes = {index: str(index) for index in range(10)}
    config = tiny_config("detr") | {"id2label": classes, "label2id": {v: k for k, v in classes.items()}}
    config |= {"d_model": width, "decoder_layers": 1 + (width > 16), "encoder_layers": 1}
    return load_config_model(config, {"size": {"height": 64, "width": 64}})


@cache
def uncalibrated() -> tuple[nn.Module, Plan]:
    """The student as a resumed run builds it: rewritten, and every range still unknown."""
    detector = built(16)
    model = copy.deepcopy(detector.model)
    facts = trace(model, detector.family, (64, 64))
    plan = make_plan(recipe_from_dict({"schema": 1, "rules": RULES}, source="test"), facts)
    rewrite(model, plan, facts)
    return model, plan


def images_of(data, augment: Augment | None) -> ImageSet:
    return ImageSet(data, built(16).processor, range(10), augment=augment, seed=0)


@pytest.fixture(scope="module")
def calibrated(data) -> nn.Module:
    model = copy.deepcopy(uncalibrated()[0])
    calibrate(model, images_of(data, None), Calibrate(images=4, batch_size=2), device=CPU)
    return model


class Watch:
    """Keeps what is on after each step, and at one step sends a signal."""

    def __init__(self, stop_at: int = -1):
        self.stop_at, self.entries, self.on, self.trainer = stop_at, [], [], None

    def stepped(self, step, total, entry):
        self.entries.append(entry)
        self.on.append({path for path, each in quantizers(self.trainer.model).items() if each.enabled})
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def evaluated(self, step, total, metrics):
        pass


def trainer(
    folder: Path, data, model: nn.Module, *, train: Train = TRAIN, watch=None, **options
) -> tuple[Trainer, list]:
    """A trainer of this model, and what was on when it was evaluated or saved."""
    folder.mkdir(exist_ok=True)
    seen: list[tuple[str, bool]] = []

    def note(kind: str, module: nn.Module) -> None:
        seen.append((kind, all(each.enabled for each in quantizers(module).values())))

    def save(module, where, metrics):
        note("save", module)
        where.mkdir(exist_ok=True)
        torch.save(module.state_dict(), where / "model.pt")

    def evaluate(module):
        note("evaluate", module)
        return measure(data, [])

    options = {"distill": DISTILL, "teacher": copy.deepcopy(built(32).model), "same_origin": False} | options
    made = Trainer(
        copy.deepcopy(model),
        built(16).family,
        train=train,
        images=images_of(data, train.augment),
        folder=folder,
        save=save,
        evaluate=evaluate,
        plan=uncalibrated()[1],
        device="cpu",
        watch=watch,
        **options,
    )
    if watch is not None:
        watch.trainer = made
    return made, seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, calibrated) -> tuple[Trainer, Watch, list]:
    """The uninterrupted run."""
    watch = Watch()
    made, seen = trainer(tmp_path_factory.mktemp("run") / "a", data, calibrated, watch=watch)
    made.fit()
    return made, watch, seen


def flat(state: object, name: str = "") -> dict[str, object]:
    """Every leaf of a nested state by its path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, each in items for path, leaf in flat(each, f"{name}.{key}").items()}
    return {name: state}


@pytest.mark.parametrize("at", [1, 3, 5], ids=["first stage", "between epochs", "all quantized"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, data, calibrated, straight, at):
    """Weights, ranges, alignment, auxiliary queries, projections, frozen weights, optimiser and averages.

    As in the command, the resumed model was never calibrated: all it knows comes from the checkpoint.
    """
    with pytest.raises(Interrupted):
        trainer(tmp_path / "b", data, calibrated, watch=Watch(at))[0].fit()
    torch.manual_seed(99)  # a new process starts anywhere
    resumed, _ = trainer(tmp_path / "b", data, uncalibrated()[0])
    resumed.fit(resume=True)
    expected, got = (
        flat(torch.load(run.folder / "last" / "state.pt", weights_only=True))
        for run in (straight[0], resumed)
    )
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, got[name]), name
        elif not name.endswith("seconds"):
            assert value == got[name], name
    assert any("projections.memory" in name for name in expected)
    assert any(name.startswith(".extras.queries") for name in expected)
    assert any(name.startswith(".oscillation") and name.endswith("frozen") for name in expected)


def test_everything_took_part(straight, calibrated):
    """Else the test above would show nothing."""
    made, watch, _ = straight
    assert 0 < made.oscillation.frozen < 1
    names, taught = {"one_to_many", "train_iou_aware"}, {f"distill_{name}" for name in DISTILL.terms}
    assert all(names <= set(entry) and entry["one_to_many"] > 0 for entry in watch.entries)
    assert [taught <= set(entry) for entry in watch.entries] == [True] * 5 + [False]
    fitted = [m for m in made.model.modules() if isinstance(m, DistributionAlignment)]
    assert fitted
    assert all(bool(each.fitted) for each in fitted)
    before = dict(calibrated.named_parameters())
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("q_alignment.gamma" in name for name in moved)
    fresh, _ = trainer(made.folder.parent / "fresh", made.images.data, calibrated)
    for name, value in fresh.extras.state_dict().items():
        assert not torch.equal(value, made.extras.state_dict()[name]), name


def test_frozen_weights_stand_on_their_numbers(straight):
    made, _, _ = straight
    for path, track in made.oscillation.tracks.items():
        layer = made.oscillation.layers[path]
        numbers = layer.weight_quantizer.integers(layer.weight.detach())
        assert torch.equal(numbers[track.frozen], track.number[track.frozen].int()), path


def test_stages_are_on_as_told_and_whatever_is_measured_or_saved_has_all_on(straight):
    made, watch, seen = straight
    every = set(quantizers(made.model))
    backbone = {path for path in every if path.startswith("model.backbone.")}
    weights = {path for path in every if path.endswith(".weight_quantizer")}
    assert backbone < every
    assert watch.on == [backbone, backbone, weights, weights, every, every]
    assert {kind for kind, _ in seen} == {"evaluate", "save"}
    assert [kind for kind, _ in seen].count("evaluate") == 2, "one of them in the second stage"
    assert all(on for _, on in seen)


def test_a_run_stopped_in_a_stage_is_saved_with_all_on(tmp_path, data, calibrated):
    made, seen = trainer(tmp_path / "a", data, calibrated, watch=Watch(1))
    with pytest.raises(Interrupted):
        made.fit()
    assert seen == [("save", True)]


def test_the_loss_is_the_sum_of_its_weighted_terms(straight):
    for step, entry in enumerate(straight[1].entries):
        taught = 0.2 * (1 - step / 6 / 0.8)  # the teacher's part fades
        terms = {"train_iou_aware": 0.5, "one_to_many": 0.5} | {f"distill_{n}": taught for n in DISTILL.terms}
        detection = entry["loss_ce"] + 5 * entry["loss_bbox"] + 2 * entry["loss_giou"]
        expected = detection + sum(weight * entry.get(name, 0.0) for name, weight in terms.items())
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_without_them_a_training_holds_nothing_more(tmp_path, data, calibrated):
    plain = TRAIN.model_copy(
        update={"terms": {}, "stages": (), "oscillation": None, "one_to_many": None, "steps": 1}
    )
    made, _ = trainer(tmp_path / "a", data, calibrated, train=plain, distill=Distill(), teacher=None)
    made.fit()
    state = torch.load(tmp_path / "a" / "last" / "state.pt", weights_only=True)
    assert not state["extras"]
    assert "oscillation" not in state
    assert not list(made.extras.parameters())
