"""What a processor's flags say of its sums."""

import pytest

from qdetr_cli import instructions
from qdetr_cli.instructions import sums_overflow


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [
        ({"flags": "fpu sse4_2 avx avx2 fma"}, True),
        ({"flags": "avx2 avx512f avx512bw"}, True),
        ({"flags": "avx2 avx512f avx512_vnni"}, False),
        ({"flags": "avx2 avx_vnni"}, False),
        ({"flags": "avx2 avx512f amx_int8"}, False),
        ({"Features": "fp asimd asimddp"}, False),
        ({}, False),
    ],
    ids=["Zen 3", "Skylake server", "Zen 4", "Alder Lake", "Sapphire Rapids", "ARM", "unknown"],
)
def test_without_vnni_sums_overflow(flags, overflow, monkeypatch):
    monkeypatch.setattr(instructions, "cpuinfo", lambda: flags)
    assert sums_overflow() == overflow


def test_onnx_runtime_adds_as_the_flags_say():
    """300 products of 255 and 127 in one sum, by the kernel that exported files use."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    from quantized_graphs import run

    weight = numpy_helper.from_array(np.full((300, 16), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [4, 300])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [4, 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = run(model, {"x": np.full((4, 300), 255, np.uint8)}, optimized=True)[0]
    assert (found != 300 * 255 * 127).any() == sums_overflow()
