"""Results as JSON has them: the keys that are promised to programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `report` answers without torch
    from qdetr_cli.benchmark.turns import Timing
    from qdetr_cli.demo import Demo
    from qdetr_cli.evaluate import Rung
    from qdetr_cli.export.floats import FloatOperation
    from qdetr_cli.export.kernels import Kernels
    from qdetr_cli.results import Benchmarked, Evaluated, Exported, Inspection, PredictedImage
    from qdetr_cli.storage import Storage


def evaluation_dict(result: Evaluated) -> dict[str, Any]:
    """What `qdetr eval --json` gives."""
    body = {**result.metrics.to_dict(), "images": result.images, "split": result.split}
    body["warnings"] = result.warnings
    return body | ({"ladder": ladder_list(result.ladder)} if result.ladder else {})


def coco_results(result: Evaluated) -> list[dict[str, Any]]:
    """The detections in COCO's results format: original category ids, boxes as x, y, width, height."""
    return [
        {
            "image_id": found.image_id,
            "category_id": result.category_ids[label],
            "bbox": [round(float(x), 3) for x in (*box[:2], box[2] - box[0], box[3] - box[1])],
            "score": round(float(score), 6),
        }
        for found in result.detections
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
    ]


def demo_dict(result: Demo) -> dict[str, Any]:
    """What `results.json` holds."""
    return {
        "model": result.model,
        "recipe": result.recipe,
        "settings": list(result.settings),
        "float": result.before.to_dict(),
        "ptq": result.calibrated.to_dict(),
        "qat": result.finetuned.to_dict(),
        "ladder": ladder_list(result.ladder),
        "seconds": round(result.seconds, 1),
        "versions": result.versions,
    }


def ladder_list(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """Each rung with its AP and its delta of AP50(voc-area) to the float rung, as a fraction.

    None where there is no object to measure on.
    """
    start = rungs[0].metrics.ap50_voc_area
    rows = []
    for rung in rungs:
        found = rung.metrics.to_dict()
        area = found["ap50_voc_area"]
        rows.append(
            {
                "rung": rung.name,
                "kind": rung.kind,
                "groups": list(rung.groups),
                "ap": found["ap"],
                "ap50_voc_area": area,
                "delta": None if area is None else area - start,
            }
        )
    return rows


def prediction_dict(found: PredictedImage) -> dict[str, Any]:
    """One image of predictions.json: boxes are xyxy in pixels of the image."""
    objects = [
        {"class": name, "score": round(score, 4), "box": [round(edge, 2) for edge in box]}
        for name, score, box in zip(found.classes, found.scores, found.boxes, strict=True)
    ]
    return {"image": str(found.path), "objects": objects}


def inspection_dict(found: Inspection) -> dict[str, Any]:
    """What `qdetr inspect --json` gives."""
    facts = found.facts
    body: dict[str, Any] = {
        "family": facts.family,
        "size": list(facts.size),
        "classes": {str(index): name for index, name in found.detector.class_names.items()},
        "layers": [{"path": x.path, "role": x.role, "op": x.op, "macs": x.macs} for x in facts.layers],
        "attentions": [
            {"path": x.path, "role": x.role, "op": x.op, "macs": x.macs} for x in facts.attentions
        ],
        "notes": list(facts.notes),
    }
    if found.storage is not None:
        body["storage"] = storage_dict(found.storage)
    if found.plan is not None:
        body |= {
            "plan": found.plan.to_dict(),
            "skipped": list(found.plan.skipped),
            "totals": found.plan.totals(found.parameters),
        }
    return body


def storage_dict(storage: Storage) -> dict[str, Any]:
    """What is stored in how many bits. Sizes are in bytes."""
    return {
        "files": dict(storage.files),
        "bytes": storage.bytes,
        "float_bytes": storage.float_bytes,
        "stored": [asdict(row) for row in storage.rows],
    }


def export_dict(result: Exported) -> dict[str, Any]:
    """What `qdetr export --json` gives. Sizes are in MB of 10^6 bytes."""
    return {
        "to": result.to,
        "files": [str(path) for path in result.files],
        "quantized": result.quantized,
        "size": None if result.size is None else list(result.size),
        "size_mb": _mega(result.bytes),
        "float_size_mb": _mega(result.float_bytes),
        "kernels": None if result.kernels is None else kernels_dict(result.kernels, result.floats),
        "parity": None if result.parity is None else result.parity.to_dict(),
        "metrics": {name: metrics.to_dict() for name, metrics in result.metrics.items()},
        "seconds": round(result.seconds, 1),
        "versions": result.versions,
    }


def kernels_dict(kernels: Kernels, floats: Sequence[FloatOperation]) -> dict[str, Any]:
    """Of each kind how many operations run on integer kernels; which do not, and why ("": though planned)."""
    kinds = {kind: kernels.count(kind) for kind in kernels.kinds()}
    return {
        "runtime": kernels.runtime,
        **{kind: {"integer": integer, "all": every} for kind, (integer, every) in kinds.items()},
        "float": [{"path": each.path, "reason": each.reason, **asdict(each.operation)} for each in floats],
    }


def benchmark_dict(result: Benchmarked) -> dict[str, Any]:
    """What `qdetr benchmark --json` gives. Latencies are of one batch, in ms; sizes in MB of 10^6 bytes."""
    rows = zip(result.timings, result.references, strict=True)
    return {
        "size": list(result.size),
        "batch": result.batch,
        "threads": result.threads,
        "machine": result.machine,
        "busy": result.busy,
        "candidates": [_timing_dict(timing, reference) for timing, reference in rows],
    }


def _timing_dict(timing: Timing, reference: Timing | None) -> dict[str, Any]:
    own = timing.candidate
    return {
        "name": own.name,
        "origin": own.origin,
        "runtime": own.job.runtime,
        "version": timing.version,
        "quantized": own.quantized,
        "latency_ms": {"median": _milli(timing.median), "p90": _milli(timing.p90)},
        "cpu_ms": {"median": _milli(timing.cpu_median)},
        "images_per_second": round(timing.images_per_second, 3),
        "peak_memory_mb": round(timing.peak_memory_mb, 1),
        "memory_before_loading_mb": round(timing.memory_before_mb, 1),
        "load_seconds": round(timing.load_seconds, 3),
        "size_mb": _mega(own.size_bytes),
        "float": None if reference is None else reference.candidate.name,
        "speedup": None if reference is None else round(timing.speedup(reference), 3),
        "runs": timing.runs,
        "turns_ms": [_milli(median(turn)) for turn in timing.wall],
    }


def _milli(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _mega(size: int) -> float:
    return round(size / 1e6, 3)
