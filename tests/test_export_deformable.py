"""The export of Deformable-DETR, whose queries are chosen from the image."""

import pytest
from exported_families import check_export


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deformable_detr, two-stage"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=True)
