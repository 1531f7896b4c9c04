"""How much longer, and larger, a training step is under quantization than in float: ratios in one run.

    python -m benchmarks.step_time --model detr_r50 --side 320 --batch 8 --threads 2
    python -m benchmarks.step_time --variants "plain float" nncf torchao     (peers, where they are installed)

A step is a forward pass with auxiliary losses, a backward pass, clipping and AdamW, on random weights. The
float model runs its frozen batch norms, which the fake-quant model has folded. Peers get a plain loss,
squares of logits and boxes, and so does "plain float", which they are compared with. Each variant runs in
processes of its own, in turns; a time is the median of all its steps, memory the peak of resident pages while
it steps, less those before the model was made.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.detectors import MODELS, batch, fake_quant, random_detector
from benchmarks.training_peers import nncf_model, torchao_model
from qdetr_cli.checkpoint import Detector
from qdetr_cli.compiled import compiled_kernels
from qdetr_cli.data import Batch
from qdetr_cli.models import Model
from qdetr_cli.objective import Objective, clipped
from qdetr_cli.recipe import Recipe, load_recipe
from qdetr_cli.student import quick

STEPS, FIRST = 4, 2  # steps that count in one round, after some that do not
PEERS = {"nncf": nncf_model, "torchao": torchao_model}
BASE = dict.fromkeys(("plain float", *PEERS), "plain float")
VARIANTS = ("float", "qat", "qat compiled", "qat compiled, teacher", "plain float", *PEERS)

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What the steps of one variant took: seconds each, and MB at the peak."""

    seconds: list[float]
    megabytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A variant's median seconds and peak MB, and both over its float step's."""

    variant: str
    seconds: float
    megabytes: float
    times: float
    memory: float


def main() -> None:
    """Print a table, and add it to a JSON file."""
    arguments = _arguments()
    if arguments.only:
        print(json.dumps(asdict(taken(arguments.only, arguments))))
        return
    found: dict[str, list[Taken]] = {name: [] for name in arguments.variants}
    for _ in range(arguments.rounds):
        for name in arguments.variants:
            found[name].append(_in_own_process(name))
    rows = list(_rows(found))
    for row in rows:
        print(
            f"{row.variant:24} {row.seconds:7.3f} s {row.times:5.2f} x float"
            f"{row.megabytes:9.0f} MB {row.memory:5.2f} x float"
        )
    if arguments.out:
        _add(arguments.out, vars(arguments), rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="detr_r50")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:4]))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lacking = {BASE.get(name, "float") for name in arguments.variants} - {*arguments.variants}
    if lacking:
        parser.error(f"--variants: {', '.join(lacking)} must be among them, to be compared with")
    return arguments


def _in_own_process(name: str) -> Taken:
    command = [sys.executable, "-m", "benchmarks.step_time", *sys.argv[1:], "--only", name]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def taken(name: str, arguments: argparse.Namespace) -> Taken:
    """The steps of one variant, in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before = _resident("VmRSS")
    detector = random_detector(arguments.model)
    images = batch(arguments.batch, arguments.side).to("cpu")
    model, loss = _made(name, detector, images, load_recipe(arguments.recipe), arguments.recipe)
    learned = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True)
    seconds = []
    with compiled_kernels("compiled" in name):
        for step in range(FIRST + STEPS):
            if step == FIRST:  # after compiling, which is not a step's
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
            began = time.perf_counter()
            loss(model, images).backward()
            clipped(learned, 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
    return Taken(seconds=seconds[FIRST:], megabytes=_resident("VmHWM") - before)


def _made(
    name: str, detector: Detector, images: Batch, recipe: Recipe, recipe_name: str
) -> tuple[nn.Module, Loss]:
    """The variant's model in training mode, and its loss."""
    if name in PEERS:
        return PEERS[name](detector, images), _plain
    model = detector.model if "float" in name else fake_quant(detector, recipe_name, images)
    if "plain" in name:
        return model.train(), _plain
    teacher = quick(Model(detector=detector), None) if "teacher" in name else None
    distill = recipe.distill
    objective = Objective(model, detector.family, recipe.train, distill, teacher=teacher, same_origin=True)
    return model.train(), lambda wrapped, given: objective(wrapped, given)[0]


def _plain(model: nn.Module, images: Batch) -> Tensor:
    """The squares of logits and boxes, whether the model names its outputs or not."""
    outputs = model(images.pixel_values)
    logits, boxes = (outputs.logits, outputs.pred_boxes) if hasattr(outputs, "logits") else outputs[:2]
    loss: Tensor = logits.square().mean() + boxes.square().mean()
    return loss


def _resident(key: str) -> float:
    """Resident MB of this process: VmRSS now, VmHWM at the peak."""
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key)]
    return int(line.split()[1]) / 1024


def _rows(found: dict[str, list[Taken]]) -> list[Row]:
    seconds = {
        name: statistics.median(s for each in runs for s in each.seconds) for name, runs in found.items()
    }
    memory = {name: statistics.median(each.megabytes for each in runs) for name, runs in found.items()}
    return [
        Row(
            variant=name,
            seconds=round(seconds[name], 3),
            megabytes=round(memory[name]),
            times=round(seconds[name] / seconds[BASE.get(name, "float")], 3),
            memory=round(memory[name] / memory[BASE.get(name, "float")], 3),
        )
        for name in found
    ]


def _add(path: Path, settings: dict[str, object], rows: list[Row]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = {name: value for name, value in settings.items() if name not in ("out", "only")}
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"settings": kept, "versions": versions, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps([*known, entry], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
