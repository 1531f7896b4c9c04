"""Pictures: the ladder as a plot, and boxes on images."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from qdetr_cli.data import read_image
from qdetr_cli.evaluate import Rung
from qdetr_cli.results import PredictedImage

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#800000",
    "#808000",
    "#000075",
)
KIND_COLORS = {"float": "#555555", "cumulative": "#4363d8", "alone": "#3cb44b", "left out": "#f58231"}
SMALLEST_SIDE = 320  # images smaller than this are drawn enlarged, so that labels can be read


def plot_ladder(rungs: Sequence[Rung], path: Path) -> None:
    """Bars of AP50(voc-area), one per rung: cumulative, each group alone, and all but each."""
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rungs) + 1.2), layout="constrained")
    names = [rung.name for rung in rungs]
    values = [100 * max(0.0, rung.metrics.ap50_voc_area) for rung in rungs]  # -1: nothing to measure on
    bars = axes.barh(range(len(rungs)), values, color=[KIND_COLORS[rung.kind] for rung in rungs])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(rungs)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("AP50(voc-area)")
    axes.set_title("What each module group costs")
    axes.axvline(values[0], color=KIND_COLORS["float"], linewidth=1, linestyle="--")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_bars(values: dict[str, float], path: Path, *, title: str) -> None:
    """One bar of AP50(voc-area) for each name."""
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    bars = axes.bar(
        list(values), [100 * value for value in values.values()], color=list(COLORS[: len(values)])
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_ylim(0, 105)
    axes.set_ylabel("AP50(voc-area)")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_boxes(found: Sequence[PredictedImage], out: Path) -> list[Path]:
    """The images of `found` with boxes, class and score, as PNG files in `out`; names never collide."""
    written: list[Path] = []
    for each in found:
        path = _free_name(out, each.path.stem, written)
        _drawn(each).save(path)
        written.append(path)
    return written


def _drawn(found: PredictedImage) -> Image.Image:
    image = read_image(found.path)
    factor = max(1, round(SMALLEST_SIDE / min(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(12, min(image.size) // 32))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(sorted(set(found.classes)))}
    for box, score, name in zip(found.boxes, found.scores, found.classes, strict=True):
        left, top, right, bottom = (edge * factor for edge in box)
        label = f"{name} {score:.2f}"
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colors[name], width=2)
        area = draw.textbbox((max(0, left), max(0, top)), label, font=font)
        draw.rectangle(area, fill=colors[name])
        draw.text((max(0, left), max(0, top)), label, fill="white", font=font)
    return image


def _free_name(out: Path, stem: str, taken: Sequence[Path]) -> Path:
    path, number = out / f"{stem}.png", 1
    while path in taken:
        number += 1
        path = out / f"{stem}-{number}.png"
    return path
