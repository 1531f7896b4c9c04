"""A training that is killed again and again ends as the one that never was, to the last bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import Told, write_model, write_voc

from qdetr_cli import pipeline
from qdetr_cli.models import Source
from qdetr_cli.results import DataSource
from qdetr_cli.runs import atomic_folder, recover

KILLS = 6  # at most, for each training
SETTINGS = (
    "calibrate.images=4",
    "train.epochs=4",  # of two steps
    "train.batch_size=2",
    "train.accumulate=2",
    "train.ema=0.9",
    "train.lr=1e-3",
    "train.workers=2",
)
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(str(write_model(tmp_path_factory.mktemp("model") / "detr")))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSource:
    return DataSource(write_voc(tmp_path_factory.mktemp("data") / "voc", "0123456789", [(64, 64)] * 8))


def training(
    source: Source, data: DataSource, out: Path, settings: tuple[str, ...]
) -> multiprocessing.Process:
    """A process of its own that begins the training in `out`, or goes on with it."""

    def train() -> None:
        pipeline.finetune(
            source,
            recipe="w4a4",
            data=data,
            out=out,
            overrides=settings,
            resume=(out / "run.json").exists(),
            device="cpu",
            listener=Told(),
        )

    process = fork.Process(target=train)
    process.start()
    return process


def left(out: Path) -> dict[str, object]:
    """What a training leaves: weights and manifests of both checkpoints, the journal without its clock."""
    found: dict[str, object] = {}
    for part in ("last", "best"):
        found[part] = load_file(out / part / "model.safetensors")
        found[f"{part} manifest"] = json.loads((out / part / "qdetr.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found | {"journal": [{**line, "seconds": 0} for line in lines]}


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    for part in ("last", "best"):
        mine, theirs = one.pop(part), other.pop(part)
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not mine[name].equal(theirs[name])] == []
    assert one == other


@pytest.mark.parametrize("save_minutes", ["null", "1e-9"], ids=["after evaluations", "after every step"])
def test_killed_at_random_moments_it_ends_as_if_it_never_was(tmp_path, source, data, save_minutes):
    settings = (*SETTINGS, f"train.save_minutes={save_minutes}")
    began = time.monotonic()
    straight = training(source, data, tmp_path / "straight", settings)
    straight.join()
    assert straight.exitcode == 0
    took, draw, out = time.monotonic() - began, random.Random(0), tmp_path / "killed"
    kills = 0
    while True:
        process = training(source, data, out, settings)
        process.join(timeout=None if kills == KILLS else draw.uniform(0.1, 0.7 * took))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert sorted(each.name for each in out.iterdir()) == ["best", "last", "metrics.jsonl", "run.json"]
    assert_same(left(tmp_path / "straight"), left(out))


def _replace_until_killed(folder: Path) -> None:
    number = 0
    while True:
        with atomic_folder(folder / "last") as draft:
            (draft / "a").write_text(str(number))
            (draft / "b").write_text(str(number))
        number += 1


def test_a_folder_that_is_being_replaced_is_the_old_or_the_new(tmp_path):
    """Killed forty times at random moments; the two files in it are always of one writing."""
    draw = random.Random(0)
    for _ in range(40):
        process = fork.Process(target=_replace_until_killed, args=(tmp_path,))
        process.start()
        while not list(tmp_path.glob("*last*")):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.005, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        recover(tmp_path)
        if (tmp_path / "last").exists():
            assert (tmp_path / "last" / "a").read_text() == (tmp_path / "last" / "b").read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["last"]


def test_what_was_moved_away_for_a_successor_that_never_came_is_put_back(tmp_path):
    (tmp_path / ".last.old.x" / "last").mkdir(parents=True)
    (tmp_path / ".last.old.x" / "last" / "a").write_text("1")
    (tmp_path / ".last.y").mkdir()
    (tmp_path / ".metrics.jsonl.z").write_text("")
    recover(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["last"]
    assert (tmp_path / "last" / "a").read_text() == "1"
