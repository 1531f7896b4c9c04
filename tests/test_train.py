"""Training on tiny models: resuming is bit-exact, stopping leaves a checkpoint, divergence is named."""

import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_detectors import tiny_config

from qdetr_cli.batchnorm import thaw_batch_norms
from qdetr_cli.checkpoint import Detector, load_config_model
from qdetr_cli.data import ImageSet, open_data
from qdetr_cli.errors import DivergedError, RecipeError, RunError
from qdetr_cli.metrics import measure
from qdetr_cli.recipe import Augment, Distill, Term, Train
from qdetr_cli.runs import Journal
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.signals import Interrupted
from qdetr_cli.train import Trainer

TRAIN = Train(
    steps=6, batch_size=2, lr=1e-3, backbone_lr=1e-3, ema=0.9, workers=0, augment=Augment(color=0.2)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=6, val=2, size=64)
    return open_data(folder / "voc", split="train")


def built(name: str) -> Detector:
    torch.manual_seed(0)
    classes = {index: str(index) for index in range(10)}
    config = tiny_config(name) | {"id2label": classes, "label2id": {v: k for k, v in classes.items()}}
    return load_config_model(config, {"size": {"height": 64, "width": 64}})


class Watch:
    """Keeps what it is told, and at one step does something."""

    def __init__(self, at: int = -1, act=lambda: None):
        self.entries: list[dict[str, float]] = []
        self.at, self.act = at, act

    def stepped(self, step, total, entry):
        self.entries.append(entry)
        if step == self.at:
            self.act()

    def evaluated(self, step, total, metrics):
        pass


def trainer(
    folder: Path, data, name: str = "detr", *, train: Train = TRAIN, watch=None, **options
) -> Trainer:
    folder.mkdir(exist_ok=True)
    detector = built(name)
    if train.batch_norm == "train":
        thaw_batch_norms(detector.model, detector.family)
    images = ImageSet(data, detector.processor, range(10), augment=train.augment, seed=train.seed)

    def save(module, where, metrics):
        where.mkdir(exist_ok=True)
        torch.save(module.state_dict(), where / "model.pt")

    return Trainer(
        detector.model,
        detector.family,
        train=train,
        distill=options.pop("distill", Distill()),
        images=images,
        folder=folder,
        save=save,
        evaluate=lambda module: measure(data, []),
        device="cpu",
        watch=watch,
        **options,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last" / "model.pt", weights_only=True)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def stop_by(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["detr", "d_fine"])
@pytest.mark.parametrize("at", [2, 3, 4], ids=["in an epoch", "at its end", "in the next"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, data, name, at):
    """Weights, averages, order, augmentation and random draws (D-FINE's denoising): bit for bit."""
    straight = trainer(tmp_path / "a", data, name)
    straight.fit()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "b", data, name, watch=Watch(at, stop_by(signal.SIGINT))).fit()
    torch.manual_seed(99)  # a new process starts anywhere
    resumed = trainer(tmp_path / "b", data, name)
    resumed.fit(resume=True)
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert_equal(straight.model.state_dict(), resumed.model.state_dict())


def test_training_again_with_the_same_seed_gives_the_same_weights_and_another_seed_does_not(tmp_path, data):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer(tmp_path / folder, data, train=TRAIN.model_copy(update={"seed": seed})).fit()
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert any(not torch.equal(x, weights(tmp_path / "c")[n]) for n, x in weights(tmp_path / "a").items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, data, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        trainer(tmp_path / "a", data, watch=Watch(2, stop_by(number))).fit()
    assert caught.value.number == number
    state = torch.load(tmp_path / "a" / "last" / "state.pt", weights_only=True)
    assert state["position"]["step"] == 2
    assert signal.getsignal(number) == before


def test_accumulated_batches_give_the_gradient_of_their_mean(tmp_path, data):
    """Two batches of 2 in one step: the same losses as the mean of the two taken apart."""
    steady = TRAIN.model_copy(update={"lr": 1e-12, "backbone_lr": 0.0, "steps": 2, "augment": Augment()})
    apart, together = Watch(), Watch()
    trainer(tmp_path / "a", data, train=steady, watch=apart).fit()
    joined = steady.model_copy(update={"accumulate": 2, "steps": 1})
    trainer(tmp_path / "b", data, train=joined, watch=together).fit()
    mean = sum(entry["loss"] for entry in apart.entries) / 2
    assert together.entries[0]["loss"] == pytest.approx(mean, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_and_names_the_module(tmp_path, data):
    stopped = trainer(tmp_path / "a", data)

    def break_it():
        with torch.no_grad():
            stopped.model.class_labels_classifier.bias[0] = float("nan")

    stopped.watch = Watch(2, break_it)
    with pytest.raises(DivergedError, match=r"step 2: .*class_labels_classifier\.bias"):
        stopped.fit()


def test_predictions_that_are_not_finite_are_no_traceback_of_the_matcher(tmp_path, data):
    wild = TRAIN.model_copy(update={"lr": 1e30, "backbone_lr": 1e30, "clip": 0.0})
    with pytest.raises(DivergedError, match=r"step \d: the (predictions are|loss is|gradient is) not finite"):
        trainer(tmp_path / "a", data, train=wild).fit()


def test_gradients_whose_squares_overflow_are_clipped(tmp_path, data):
    """1e25 is finite, its square is not; clipped, it moves the weight as 1e3 does."""
    states = []
    for size in (1e3, 1e25):
        train = TRAIN.model_copy(update={"steps": 1, "ema": None, "clip": 1e-3})
        each = trainer(tmp_path / str(size), data, train=train)
        for parameter in each.model.parameters():
            parameter.requires_grad_(False)
        weight = each.model.class_labels_classifier.weight.requires_grad_(True)
        weight.register_hook(lambda gradient, size=size: torch.full_like(gradient, size))
        each.fit()
        states.append(weight.detach())
    assert torch.equal(*states)
    assert states[0].isfinite().all()


def test_a_gradient_that_is_not_finite_stops_and_names_its_parameter(tmp_path, data):
    broken = trainer(tmp_path / "a", data)
    broken.model.class_labels_classifier.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        DivergedError, match=r"step 0: the gradient is not finite; first bad .*classifier\.weight"
    ):
        broken.fit()


@pytest.mark.parametrize(("scale", "stops"), [(1.0, False), (2.0**-20, True)])
def test_fp16_leaves_steps_out_but_not_for_ever(tmp_path, data, scale, stops):
    made = trainer(tmp_path / "a", data)
    made.train = made.train.model_copy(update={"precision": "fp16"})
    made.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    parameter = made.model.class_labels_classifier.bias
    parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(DivergedError, match="the gradient is not finite") if stops else nullcontext():
        made._update()


def test_live_batch_norms_move_and_frozen_ones_do_not(tmp_path, data):
    for kind in ("train", "frozen"):
        each = trainer(tmp_path / kind, data, train=TRAIN.model_copy(update={"batch_norm": kind, "steps": 2}))
        means = {n: x.clone() for n, x in each.model.state_dict().items() if n.endswith("running_mean")}
        each.fit()
        moved = [not torch.equal(each.model.state_dict()[n], x) for n, x in means.items()]
        assert all(moved) if kind == "train" else not any(moved)


def test_frozen_parameters_do_not_move(tmp_path, data):
    each = trainer(tmp_path / "a", data, train=TRAIN.model_copy(update={"freeze": ("model.backbone.*",)}))
    before = {n: x.clone() for n, x in each.model.state_dict().items()}
    each.fit()
    after = each.model.state_dict()
    for name, value in before.items():
        same = torch.equal(after[name], value)
        assert same if "backbone" in name else (not same or "position" in name), name


def test_a_freeze_pattern_that_matches_nothing_is_an_error(tmp_path, data):
    with pytest.raises(RecipeError, match=r"train\.freeze: neck"):
        trainer(tmp_path / "a", data, train=TRAIN.model_copy(update={"freeze": ("neck.*",)}))


def test_more_accumulation_than_images_is_an_error(tmp_path, data):
    with pytest.raises(RecipeError, match=r"train\.accumulate: 9 batches of 2"):
        trainer(tmp_path / "a", data, train=TRAIN.model_copy(update={"accumulate": 9})).fit()


def test_a_run_stopped_at_the_end_of_an_epoch_is_evaluated_there_when_it_goes_on(tmp_path, data):
    with pytest.raises(Interrupted):
        trainer(tmp_path / "a", data, watch=Watch(3, stop_by(signal.SIGINT))).fit()
    trainer(tmp_path / "a", data).fit(resume=True)
    entries = Journal(tmp_path / "a" / "metrics.jsonl").entries()
    assert [entry["step"] for entry in entries if "metrics" in entry] == [3, 6]


def test_a_finished_run_that_is_resumed_says_its_end_once_more_and_leaves_what_it_left(tmp_path, data):
    finished = trainer(tmp_path / "a", data).fit()
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    again = trainer(tmp_path / "a", data).fit(resume=True)
    assert again == finished
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before


def test_fp16_without_cuda_is_refused(tmp_path, data):
    with pytest.raises(RunError, match="fp16 needs CUDA"):
        trainer(tmp_path / "a", data, train=TRAIN.model_copy(update={"precision": "fp16"}))


def test_bf16_trains(tmp_path, data):
    watch = Watch()
    trainer(
        tmp_path / "a", data, "d_fine", train=TRAIN.model_copy(update={"precision": "bf16"}), watch=watch
    ).fit()
    assert len(watch.entries) == TRAIN.steps


def test_nothing_to_resume_is_said(tmp_path, data):
    with pytest.raises(RunError, match="nothing to resume"):
        trainer(tmp_path / "a", data).fit(resume=True)


def test_a_teacher_adds_its_terms_and_stays_as_it_was(tmp_path, data):
    teacher = built("detr").model
    with torch.no_grad():  # the student begins as its twin: a mark tells them apart
        teacher.class_labels_classifier.bias[0] += 1.0
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    watch = Watch()
    distill = Distill(teacher="float", terms={"logits": Term(), "boxes": Term()})
    trainer(tmp_path / "a", data, distill=distill, teacher=teacher, watch=watch).fit()
    assert watch.entries[0]["distill_logits"] > 0
    assert 0 <= watch.entries[0]["distill_boxes"] < 0.01  # dropout alone
    assert_equal(before, teacher.state_dict())


def test_journal_holds_evaluations_and_is_json(tmp_path, data):
    trainer(tmp_path / "a", data).fit()
    entries = Journal(tmp_path / "a" / "metrics.jsonl").entries()
    assert [entry["step"] for entry in entries if "metrics" in entry] == [3, 6]
    json.dumps(entries, allow_nan=False)
