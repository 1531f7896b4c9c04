"""Measure the shipped recipes on the embedded detectors: float, calibrated (PTQ) and fine-tuned (QAT).

    python -m benchmarks.recipes runs/recipes --models conditional_detr d_fine --recipes w4a4 w2a2 --seeds 0

Each run is what `qdetr demo` does, with its settings (qdetr_cli/demo.py). The averaged weights of the last
step are measured, never the best evaluation. Rows go to benchmarks/results/recipes.csv; what is there is not
run again.
"""

import argparse
import json
from pathlib import Path

from benchmarks.ledger import Ledger, commit
from qdetr_cli import pipeline, report
from qdetr_cli.demo import SETTINGS, TRAIN_IMAGES, VAL_IMAGES, embedded
from qdetr_cli.results import DataSource
from qdetr_cli.scene_files import write_scenes

RESULTS = Path(__file__).parent / "results" / "recipes.csv"
PTQ_ONLY = ("w8a8",)  # nothing to train: calibrating is enough
COLUMNS = ("model", "recipe", "seed", "row", "ap", "ap50_voc_area", "steps", "seconds", "commit", "settings")


def main() -> None:
    """Run what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["conditional_detr", "d_fine"])
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a4", "w4a4_attn4", "w3a3", "w2a2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scenes = arguments.out / "scenes"
    if not scenes.exists():
        write_scenes(scenes, train=TRAIN_IMAGES, val=VAL_IMAGES)
    for model in arguments.models:
        for recipe in arguments.recipes:
            for seed in arguments.seeds:
                measure(model, recipe, seed, arguments)


def measure(model: str, recipe: str, seed: int, arguments: argparse.Namespace) -> None:
    """One recipe on one model with one seed: three rows, float, ptq and qat."""
    results = Ledger(path=arguments.results, columns=COLUMNS, keys=3)
    if results.has((model, recipe, str(seed))):
        print(f"{model} {recipe} seed {seed}: measured already", flush=True)
        return
    page, data = report.Page(json=True), DataSource(arguments.out / "scenes" / "voc")
    settings = [*SETTINGS, *arguments.overrides, f"train.seed={seed}", f"calibrate.seed={seed}"]
    folder = arguments.out / f"{model}-{recipe}-{seed}"
    common = {"recipe": recipe, "data": data, "overrides": settings, "listener": page}
    ptq = pipeline.quantize(embedded(model), out=folder / "ptq", **common)
    found = {"float": ptq.before, "ptq": ptq.after}
    steps, seconds = 0, 0.0
    if recipe not in PTQ_ONLY:
        fit = pipeline.finetune(embedded(model), out=folder / "qat", **common).fit
        found["qat"], steps, seconds = fit.last, fit.steps, fit.seconds
    for name, metrics in found.items():
        row = [model, recipe, seed, name, round(metrics.ap, 4), round(metrics.ap50_voc_area, 4)]
        trained = name == "qat"
        extra = [
            steps if trained else 0,
            round(seconds) if trained else 0,
            commit(),
            json.dumps(arguments.overrides),
        ]
        print(*row, *extra[:2], flush=True)
        results.add(row + extra)


if __name__ == "__main__":
    main()
