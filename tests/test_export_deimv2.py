"""The export of DEIMv2."""

import pytest
from exported_families import check_export


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deimv2"])
def test_it_computes_what_the_fake_quant_model_computes(name):
    check_export(name, mask=False)
