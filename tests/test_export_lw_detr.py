"""The export of LW-DETR and RF-DETR."""

import pytest
from exported_families import check_export


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lw_detr", "rf_detr"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=True)
