"""The export of RT-DETR and RT-DETRv2."""

import pytest
from exported_families import check_export


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=False)
