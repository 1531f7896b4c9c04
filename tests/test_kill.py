"""A training that is killed again and again ends as the one that never was, to the last bit."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import Told, write_model, write_voc

from qdetr_cli import pipeline
from qdetr_cli.models import Source
from qdetr_cli.results import DataSource
from qdetr_cli.runs import atomic_folder, recover

KILLS = 4  # at most, for each training
SETTINGS = (
    "calibrate.images=4",
    "train.epochs=4",  # of two steps
    "train.batch_size=2",
    "train.accumulate=2",
    "train.ema=0.9",
    "train.lr=1e-3",
    "train.workers=2",
)
# Not a fork of this process: torch's autograd may have run in it, and cannot in a fork then. What forks has
# imported all, and has exported the model, which every training would do again.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["exported"])


@pytest.fixture(scope="module", autouse=True)
def forking() -> None:
    """Starts what forks: it finds its modules where tests are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        started(time.sleep, 0).join()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(str(write_model(tmp_path_factory.mktemp("model") / "detr")))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSource:
    return DataSource(write_voc(tmp_path_factory.mktemp("data") / "voc", "0123456789", [(64, 64)] * 8))


def train(source: Source, data: DataSource, out: Path, settings: tuple[str, ...]) -> None:
    """Begin the training in `out`, or go on with it; its workers are forks, as they are from a shell."""
    multiprocessing.set_start_method("fork", force=True)
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


def started(target, *arguments):
    """A process of its own at work."""
    process = processes.Process(target=target, args=arguments)
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
    straight = started(train, source, data, tmp_path / "straight", settings)
    straight.join()
    assert straight.exitcode == 0
    took, draw, out = time.monotonic() - began, random.Random(0), tmp_path / "killed"
    kills = 0
    while True:
        process = started(train, source, data, out, settings)
        while kills == 0 and not (out / "run.json").exists():
            time.sleep(0.01)  # the first is killed as soon as its training begins
        process.join(timeout=None if kills == KILLS else draw.uniform(0.1, 0.5 * took) if kills else 0.1)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert sorted(each.name for each in out.iterdir()) == ["best", "last", "metrics.jsonl", "run.json"]
    assert_same(left(tmp_path / "straight"), left(out))


def replace_until_killed(folder: Path) -> None:
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
        process = started(replace_until_killed, tmp_path)
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
    (tmp_path / "..last.y.z").mkdir()
    (tmp_path / "..last.y.old.z" / ".last.y").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.z").write_text("")
    recover(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["last"]
    assert (tmp_path / "last" / "a").read_text() == "1"
