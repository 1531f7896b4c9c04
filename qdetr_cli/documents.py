"""Results as JSON has them: the keys that are promised to programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `report` answers without torch
    from qdetr_cli.demo import Demo
    from qdetr_cli.evaluate import Rung
    from qdetr_cli.results import Evaluated, Inspection, PredictedImage


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
    if found.plan is not None:
        body |= {
            "plan": found.plan.to_dict(),
            "skipped": list(found.plan.skipped),
            "totals": found.plan.totals(found.parameters),
        }
    return body
