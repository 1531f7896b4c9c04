"""Two processes do what one does: the same gradients, weights and metrics, and one of them writes."""

import json
import os
import signal
from dataclasses import replace
from hashlib import sha256
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from several import Ended, in_processes, results
from tiny_detectors import CONFIGS, tiny_config
from tiny_runs import DIGITS, write_model, write_voc
from torch import nn

from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.cli import app
from qdetr_cli.data import Batch, ImageSet
from qdetr_cli.engine import shared_out
from qdetr_cli.errors import DataError, RunError
from qdetr_cli.families import family_of
from qdetr_cli.objective import Objective
from qdetr_cli.processes import average_gradients, joined, rank, world
from qdetr_cli.recipe import Distill, OneToMany, Term, Train
from qdetr_cli.train import Trainer

# One of each kind of loss. The DDF of D-FINE and DEIMv2 is a mean of each process, so it is left out.
FAMILIES = [
    name
    for name in CONFIGS
    if family_of(CONFIGS[name]["model_type"]).trainable and "," not in name and "-" not in name[4:]
] + ["deformable_detr, two-stage"]
CASES = [(name, "") for name in FAMILIES] + [
    *((name, "taught") for name in ("detr", "conditional_detr", "rt_detr")),
    ("detr", "one to many"),
]
TERMS = ("logits", "boxes", "foreground_queries", "co_attended", "memory")
OBJECTS = (1, 0, 4, 2)  # of each image, so that the halves have 1 and 6


def detector(name: str) -> Any:
    """A tiny detector in training mode that draws nothing at random."""
    torch.manual_seed(0)
    fixed = {"num_denoising": 0, "weight_loss_ddf": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
    detector = load_config_model(tiny_config(name) | fixed, {"size": {"height": 64, "width": 96}})
    for module in detector.model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        for each in ("p", "dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, each, None), float):
                setattr(module, each, 0.0)
    return detector


def batch(images: slice) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(OBJECTS), 3, 64, 96, generator=generator)
    labels = [
        {
            "class_labels": torch.randint(3, (count,), generator=generator),
            "boxes": 0.2 + 0.2 * torch.rand(count, 4, generator=generator),
        }
        for count in OBJECTS
    ]
    return Batch(
        pixel_values=pixels[images],
        pixel_mask=torch.ones(len(pixels[images]), 64, 96, dtype=torch.int64),
        labels=labels[images],
        image_ids=list(range(len(OBJECTS)))[images],
        sizes=torch.tensor([[64, 96]] * len(pixels[images])),
    )


def gradients(name: str, extra: str = "") -> dict[str, torch.Tensor]:
    """The gradients of what training minimises on this process's part of the batch.

    `extra`: with every distillation term and IoU-aware classification, or with auxiliary queries.
    """
    built, share = detector(name), len(OBJECTS) // world()
    torch.manual_seed(1)
    train = Train(
        terms={"iou_aware": Term(weight=1.0)} if extra == "taught" else {},
        one_to_many=OneToMany(copies=2) if extra == "one to many" else None,
    )
    distill = Distill(teacher="float", terms={each: Term(weight=1.0) for each in TERMS})
    teacher = detector(name).model if extra == "taught" else None
    objective = Objective(built.model, built.family, train, distill, teacher=teacher, same_origin=True)
    wrapped = shared_out(built.model, torch.device("cpu"))
    objective(wrapped, batch(slice(rank() * share, (rank() + 1) * share)))[0].backward()
    average_gradients(objective.extras)
    learned = [*built.model.named_parameters(), *objective.extras.named_parameters()]
    return {path: each.grad for path, each in learned if each.grad is not None}


def all_gradients(cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    with joined("cpu"):
        PartialState(cpu=True)  # as in a training: transformers looks at it
        return {case: gradients(*case) for case in cases}


def test_the_gradients_of_every_loss_are_those_of_one_process(tmp_path):
    first, second = results(in_processes(2, tmp_path, all_gradients, CASES))
    for case in CASES:
        whole = gradients(*case)
        assert first[case].keys() == whole.keys(), case
        for path, each in whole.items():
            mine = first[case][path]
            assert mine.equal(second[case][path]), (case, path)
            assert (mine - each).norm() <= 1e-4 * each.norm() + 1e-6, (case, path)


# --- commands ---


QUICK = """
schema: 1
rules:
  - {op: [linear, conv], weight: {bits: 4, init: minmax}, input: {bits: 8, init: minmax}}
calibrate: {images: 2}
distill: {teacher: float, terms: {logits: 1.0, boxes: 1.0, co_attended: 1.0}}
"""


class Plain(torch.optim.SGD):
    """In AdamW's place: an update as large as the gradient, so that no noise is made large."""

    def __init__(self, groups: Any, *, fused: bool) -> None:
        super().__init__(groups, lr=1.0, fused=fused)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model without dropout, and twice nine images of up to two objects: of one size, and of three."""
    root = tmp_path_factory.mktemp("processes")
    write_model(root / "detr")
    config = json.loads((root / "detr" / "config.json").read_text())
    (root / "detr" / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    write_voc(root / "voc", DIGITS, [(64, 64)] * 9)
    (root / "quick.yaml").write_text(QUICK)
    write_voc(root / "mixed", DIGITS, [(80, 60), (60, 90), (64, 64)] * 3)
    (root / "mixed" / "ImageSets" / "Main" / "one.txt").write_text("val4\n")
    return root


def run(*arguments: object) -> None:
    """A command as in a shell."""
    app([str(each) for each in arguments])


def run_on(*arguments: object) -> None:
    """A command after which others follow."""
    try:
        run(*arguments)
    except SystemExit as end:
        if end.code:
            raise


def train(arguments: list[object], stopped: tuple[int, int] = (-1, -1)) -> list[str]:
    """Fine-tune, and of every step a digest of all weights and scales.

    `stopped`: which process gets a signal, and after which step.
    """
    digests, update = [], Trainer._update

    def watched(self: Trainer) -> None:
        update(self)
        state = self.model.state_dict()
        digests.append(sha256(b"".join(each.numpy().tobytes() for each in state.values())).hexdigest())
        if stopped == (rank(), self.position.step):
            for worker in active_children():
                os.kill(worker.pid, signal.SIGTERM)  # launchers signal whole process groups
            os.kill(os.getpid(), signal.SIGTERM)

    torch.optim.AdamW, Trainer._update = Plain, watched  # type: ignore[misc]
    run_on("finetune", *arguments)
    return digests


def finetuning(root: Path, out: str, batch: int, *more: str) -> list[object]:
    settings = [f"train.batch_size={batch}", "train.steps=5", "train.workers=0", "train.eval_every=9"]
    settings += ["train.ema=0.5", "train.lr=0.02", "train.backbone_lr=0.02", "train.clip=10.0", *more]
    return [
        *(root / "detr", "--recipe", root / "quick.yaml", "--data", root / "voc", "--out", root / out),
        *("--device", "cpu", *(word for each in settings for word in ("--set", each))),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def messages(ended: list[Ended]) -> list[str]:
    """The lines by which the processes say why they ended."""
    return [
        line
        for each in ended
        for line in each.err.splitlines()
        if line.startswith(("error:", "interrupted", "Traceback"))
    ]


def test_a_training_on_two_then_one_then_two_processes_is_the_one_on_one(root):
    """Stopped by a signal to one process and its worker; with the same images in a step it goes on."""
    (straight,) = results(in_processes(1, root / "log", train, finetuning(root, "straight", 4)))
    begin = finetuning(root, "shared", 2, "train.workers=1")
    stopped = in_processes(2, root / "log", train, begin, (1, 1))
    assert [each.code for each in stopped] == [143, 143]
    assert messages(stopped) == ["interrupted: stopped by SIGTERM; go on with --resume"]
    assert stopped[1].out == ""
    assert sorted(each.name for each in (root / "shared").iterdir()) == ["last", "run.json"]
    more = [*finetuning(root, "shared", 4, "train.workers=1"), "--resume"]
    (stopped,) = in_processes(1, root / "log", train, more, (0, 3))
    assert stopped.code == 143
    again = in_processes(2, root / "log", train, [*begin, "--resume"])
    first, second = results(again)
    assert first == second
    assert len(first) == 2
    assert again[1].out == ""
    assert len(straight) == 5
    assert len(set(straight)) == 5
    mine, theirs = weights(root / "straight"), weights(root / "shared")
    for name, each in mine.items():
        assert (each.float() - theirs[name].float()).norm() <= 1e-4 * each.float().norm() + 1e-6, name
    refused = in_processes(2, root / "log", train, [*finetuning(root, "shared", 4), "--resume"])
    assert [each.code for each in refused] == [2, 2]
    (message,) = messages(refused)
    assert "--resume with 8 images in a step, and the run began with 4" in message


def measure(root: Path) -> None:
    """Calibrate, measure with the ladder, and measure one image, which leaves the second process nothing."""
    where = ("--data", root / "mixed", "--device", "cpu")
    with joined("cpu"):
        out = root / f"of {world()}"
        quick = ("--recipe", root / "quick.yaml", "--out", out / "ptq")
        run_on("quantize", root / "detr", *quick, *where, "--json")
        run_on(
            "eval", out / "ptq", *where, "--ladder", "--out", out / "all", "--batch-size", 2, "--workers", 0
        )
        run_on("eval", out / "ptq", *where, "--split", "one", "--out", out / "one", "--workers", 0)


def test_calibration_and_metrics_are_those_of_one_process(root):
    """Nine images in batches of two: one process has three of the five, the last of a single image."""
    results(in_processes(1, root / "log", measure, root))
    first, second = in_processes(2, root / "log", measure, root)
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
    for name in ("all/metrics.json", "all/detections.json", "one/detections.json", "ptq/model.safetensors"):
        mine, theirs = ((root / f"of {count}" / name).read_bytes() for count in (1, 2))
        assert mine == theirs, name
    assert json.loads((root / "of 2" / "all" / "detections.json").read_text())
    assert json.loads((root / "of 2" / "all" / "metrics.json").read_text())["ladder"]


def fail(root: Path, how: str) -> None:
    """A training in which one process meets something that the other does not."""

    def broken(self: ImageSet, indices: list[int]) -> Any:
        raise DataError("an image is broken")

    def not_finite(self: Trainer, given: Batch, *, part: float) -> Any:
        return passes(self, replace(given, pixel_values=given.pixel_values * float("nan")), part=part)

    def full(self: Trainer, state: Any, metrics: Any) -> None:
        raise RunError("the disk is full")

    passes = Trainer._passes
    if how == "image" and os.environ["RANK"] == "1":
        ImageSet.__getitems__ = broken  # type: ignore[method-assign]
    elif how == "value" and os.environ["RANK"] == "1":
        Trainer._passes = not_finite  # type: ignore[method-assign]
    elif how == "disk" and os.environ["RANK"] == "0":
        Trainer._write = full  # type: ignore[method-assign]
    elif how == "launch":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    elif how == "command":
        run("predict", root / "detr", root / "voc", "--out", root / "drawn")
    settings = ("--set", "train.eval_every=1", "--set", "train.steps=2", "--set", "train.batch_size=2")
    where = ("--data", root / "voc", "--out", root / how, "--device", "cpu", "--set", "train.workers=0")
    run("finetune", root / "detr", "--recipe", "float", *where, *settings)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("image", "an image is broken"),
        ("value", "the predictions are not finite"),
        ("disk", "the disk is full"),
        ("launch", "FSDP: is not supported"),
        ("command", "predict: runs in one process, and 2 were launched"),
    ],
)
def test_what_one_process_meets_ends_both_with_one_message(root, how, said):
    ended = in_processes(2, root / "log", fail, root, how)
    assert [each.code for each in ended] == [2, 2], [each.err for each in ended]
    (message,) = messages(ended)
    assert said in message
