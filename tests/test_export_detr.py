"""The export of DETR and Conditional-DETR."""

import pytest
from exported_families import check_export


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=True)
