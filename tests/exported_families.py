"""What holds for the export of every family: values, names, and an emission for each quantizer."""

import numpy as np
import torch
from exported_models import run_plain
from family_models import SIZE, ready
from onnx import numpy_helper
from quantized_detectors import inputs

from qdetr_cli.export.onnx_graph import marked, with_pairs
from qdetr_cli.export.program import exported
from qdetr_cli.export.ties import LowerIndexFirst
from qdetr_cli.rewrite import quantizers

UNREAD = (  # what is computed for no logit and no box, so that a file leaves it out
    "reading_order.",  # PP-DocLayout
    "model.decoder.bbox_embed.layers.0.input_quantizer:",  # DAB-DETR refines boxes after its last layer too
    "model.decoder.bbox_embed.layers.0.weight_quantizer:",
    "model.decoder.bbox_embed.layers.1.input_quantizer:",
    "model.decoder.bbox_embed.layers.1.weight_quantizer:",
)


def check_export(name: str, *, mask: bool, batch: int | None = None, seed: int = 1) -> None:
    """A tiny fake-quant detector as a program (to the last bit) and in ONNX Runtime (to float rounding).

    `mask` says whether its outputs depend on the mask of pixels; `batch` None: 3 images, then 1.
    `seed` draws them: where a value lies between two codes, float rounding alone would decide.
    """
    model = ready(name).model.eval()
    program = exported(model, SIZE, batch=batch)
    assert program.inputs == ("pixel_values", "pixel_mask")[: 1 + mask]
    given = inputs("mask", batch or 3, SIZE, seed)
    with torch.no_grad():
        wanted = model(**given)
        found = program.exported.module()(**{each: given[each] for each in program.inputs})
    for mine, theirs in zip(found, (wanted.logits, wanted.pred_boxes), strict=True):
        assert torch.equal(mine, theirs)
    proto = with_pairs(marked(program))
    check_every_quantizer_is_written(model, program, proto)
    for count in (batch or 3, batch or 1):
        some = {each: value[:count] for each, value in given.items()}
        with torch.no_grad(), LowerIndexFirst():
            outputs = model(**some)
        for mine, theirs in zip(run_plain(proto, some), (outputs.logits, outputs.pred_boxes), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def check_every_quantizer_is_written(model, program, proto) -> None:
    """Each quantizer that logits or boxes depend on is written, and no weight is stored in float too."""
    stored = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    nodes = {node.name for node in proto.graph.node}
    written = {key for key in program.roundings if f"{key}.quantize" in nodes or f"{key}.codes" in stored}
    assert all(key.startswith(UNREAD) for key in set(program.roundings) - written)
    paths = {key.partition(":")[0] for key in written}
    for path, quantizer in quantizers(model).items():
        if path not in paths or not path.endswith("weight_quantizer"):
            continue
        weight = model.get_submodule(path.rpartition(".")[0]).weight
        assert np.array_equal(stored[f"{path}.codes"], quantizer.integers(weight).numpy())
        copies = (array for array in stored.values() if array.dtype == np.float32)
        assert not any(
            array.shape == weight.shape and np.allclose(array, weight.detach()) for array in copies
        )
