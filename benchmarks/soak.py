"""A long training of a small detector, watched: memory, open files, the folder, and what must not drift.

    python -m benchmarks.soak runs/soak --steps 10000 --out benchmarks/results/soak.json

Every step: every quantizer's step in use is above 0, and a moving average is kept in float64 beside the
trainer's. Every 500 steps: both averages are compared, every quantizer gives numbers of its grid to the last
bit, and resident memory, open files and the folder are noted. The training evaluates, writes checkpoints
and reads images with a worker all the while. It stops at the first thing that is wrong.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli import report
from qdetr_cli.data import open_data
from qdetr_cli.demo import SETTINGS, embedded
from qdetr_cli.evaluate import evaluate
from qdetr_cli.metrics import Metrics
from qdetr_cli.models import open_model
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import load_recipe
from qdetr_cli.rewrite import quantizers
from qdetr_cli.running import bench_of
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.student import saver, teacher_of, training_images, under_recipe
from qdetr_cli.train import Trainer

EVERY = 500  # steps from one sample to the next
DRIFT = 1e-3  # of the moving average, relative to the largest number of a tensor
RUN = (
    "train.batch_size=4",
    "train.eval_every=20",
    "train.save_minutes=1",
    "train.ema=0.999",
    "train.lr=1e-3",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the process holds after some steps: MB of memory, open files, files and MB of the run's folder."""

    step: int
    resident: float
    handles: int
    files: int
    folder: float
    drift: float


class Watch:
    """Looks at the training after every step."""

    def __init__(self, folder: Path, decay: float) -> None:
        self.folder, self.decay = folder, decay
        self.trainer: Trainer | None = None
        self.expected: dict[str, Tensor] = {}
        self.samples: list[Sample] = []
        self.drift = 0.0

    def begin(self, trainer: Trainer) -> None:
        """Start the average that is kept beside the trainer's."""
        self.trainer = trainer
        self.expected = {name: each.detach().double() for name, each in trainer.model.named_parameters()}

    def stepped(self, step: int, total: int, entry: dict[str, float]) -> None:
        """Check, and now and then sample."""
        trainer = self.trainer
        assert trainer is not None
        assert trainer.average is not None
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, each in trainer.model.named_parameters():
            self.expected[name].lerp_(each.detach().double(), 1 - decay)
        for path, quantizer in quantizers(trainer.model).items():
            if not bool((quantizer.grid().step > 0).all()):
                sys.exit(f"step {step}: {path} has a step that is not positive")
        if step % EVERY:
            return
        self._check(step, trainer)
        sample = Sample(step=step, drift=self.drift, **_held(), **_folder(self.folder))
        self.samples.append(sample)
        print(json.dumps(asdict(sample)), flush=True)

    def evaluated(self, step: int, total: int, metrics: Metrics) -> None:
        """Nothing to see here."""

    def _check(self, step: int, trainer: Trainer) -> None:
        assert trainer.average is not None
        for name, value in self.expected.items():
            away = (trainer.average.tensors[name].double() - value).abs().max() / value.abs().max().clamp(
                1e-6
            )
            self.drift = max(self.drift, float(away))
        if self.drift > DRIFT:
            sys.exit(f"step {step}: the moving average is {self.drift:.2g} off")
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        with grids_watched(trainer.model) as strays, torch.no_grad():
            trainer.model(pixel_values=images)
        if strays:
            sys.exit(f"step {step}: off their grids: {', '.join(strays)}")


@contextmanager
def grids_watched(model: nn.Module) -> Iterator[list[str]]:
    """For the duration of the block, the paths of quantizers that give something off their grid."""
    strays: list[str] = []

    def look(quantizer: FakeQuantizer, given: Any, y: Tensor) -> None:
        if not torch.equal(quantizer.dequantize(quantizer.integers(y)), y):
            strays.append(quantizer.path)

    handles = [each.register_forward_hook(look) for each in quantizers(model).values()]
    try:
        yield strays
    finally:
        for handle in handles:
            handle.remove()


def _held() -> dict[str, Any]:
    lines = Path("/proc/self/status").read_text().splitlines()
    (resident,) = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
    return {"resident": round(resident, 1), "handles": len(os.listdir("/proc/self/fd"))}


def _folder(folder: Path) -> dict[str, Any]:
    files = [each for each in folder.rglob("*") if each.is_file()]
    return {"files": len(files), "folder": round(sum(each.stat().st_size for each in files) / 1e6, 2)}


def main() -> None:
    """Train, then say how memory went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--model", default="conditional_detr")
    parser.add_argument("--recipe", default="w3a3")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=arguments.model, dir=arguments.runs))
    watch = _trained(folder, arguments)
    found = _verdict(watch.samples)
    print(json.dumps(found, indent=2))
    if arguments.out:
        kept = {"model": arguments.model, "recipe": arguments.recipe, "steps": arguments.steps}
        samples = [asdict(each) for each in watch.samples]
        content = {"settings": kept, "torch": torch.__version__, "verdict": found, "samples": samples}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _trained(folder: Path, arguments: argparse.Namespace) -> Watch:
    write_scenes(folder / "scenes", train=800, val=50)
    page, where = report.Page(json=True), torch.device("cpu")
    recipe = load_recipe(arguments.recipe, [*SETTINGS, *RUN, f"train.steps={arguments.steps}"])
    source = embedded(arguments.model)
    model = open_model(source, page.say)
    mentor = teacher_of(recipe, model, page, new_head=False)
    training = open_data(folder / "scenes" / "voc", split="train")
    model = under_recipe(recipe, model, source, training, where, page, resume=False)
    bench = bench_of(model, open_data(folder / "scenes" / "voc", split="val"))
    assert recipe.train.ema is not None
    watch = Watch(folder / "run", recipe.train.ema)
    trainer = Trainer(
        model.module,
        model.family,
        train=recipe.train,
        distill=recipe.distill,
        images=training_images(model, training, recipe),
        folder=folder / "run",
        save=saver(model, recipe),
        evaluate=lambda module: evaluate(module, model.family, bench, device=where),
        plan=model.plan,
        teacher=mentor,
        device="cpu",
        watch=watch,
    )
    watch.begin(trainer)
    (folder / "run").mkdir()
    trainer.fit()
    return watch


def _verdict(samples: list[Sample]) -> dict[str, Any]:
    """How much memory grew: the slope of a line through all samples but the first quarter."""
    late = samples[len(samples) // 4 :]
    slope = statistics.linear_regression([each.step for each in late], [each.resident for each in late]).slope
    return {
        "resident_mb": [min(each.resident for each in late), max(each.resident for each in late)],
        "mb_per_1000_steps": round(1000 * slope, 3),
        "handles": [min(each.handles for each in late), max(each.handles for each in late)],
        "files": [min(each.files for each in late), max(each.files for each in late)],
        "folder_mb": [min(each.folder for each in late), max(each.folder for each in late)],
        "drift_of_average": max(each.drift for each in samples),
    }


if __name__ == "__main__":
    main()
