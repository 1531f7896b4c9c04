"""Families: a packed folder computes what the fake-quant model does; its weights are integers."""

from pathlib import Path

import pytest
import torch
from packed_models import assert_equal, fake_quant, opened, outputs

from qdetr_cli.layers import Quantized
from qdetr_cli.models import save_packed
from qdetr_cli.storage import storage_of


# Dense and deformable, shared heads, groups of queries, a backbone with attention. All others with four bits
# are in test_family_saving.
@pytest.mark.parametrize("name", ["d_fine", "deimv2-lite", "rf_detr", "yolos"])
def test_a_packed_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = fake_quant(name)
    save_packed(model, tmp_path / "packed")
    other = opened(tmp_path / "packed")
    assert_equal(outputs(model.module), outputs(other.module))
    own, packed = model.module.state_dict(), other.module.state_dict()
    assert own.keys() == packed.keys()
    weights = {f"{path}.weight" for path, each in model.module.named_modules(remove_duplicate=False)
               if isinstance(each, Quantized) and each.weight_quantizer}  # fmt: skip
    for key, value in own.items():
        if key not in weights and key.removesuffix("_quantizer.step") not in weights:
            assert torch.equal(value, packed[key]), key
    stored = {row.kind: row.values for row in storage_of(tmp_path / "packed").rows}
    planned = [each for each in model.plan.modules if each.format("weight")]
    for bits in {each.bits("weight") for each in planned}:
        expected = sum(each.weights for each in planned if each.bits("weight") == bits)
        assert stored[f"{bits}-bit integers"] == expected
