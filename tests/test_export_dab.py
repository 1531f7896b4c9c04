"""The export of DAB-DETR and Table Transformer."""

import pytest
from exported_families import check_export


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("dab-detr", 2), ("table-transformer", 1)])
def test_it_computes_what_the_fake_quant_model_computes(name, seed):
    check_export(name, mask=True, seed=seed)
