"""Which kinds of exported files this processor can judge: without VNNI only the portable ones are exact."""

import pytest

from qdetr_cli.instructions import sums_overflow

whole_sums = pytest.mark.skipif(
    sums_overflow(), reason="without VNNI sums of 8-bit products are cut at 16 bits"
)
PORTABLE = [pytest.param(False, marks=whole_sums, id="int8"), pytest.param(True, id="portable")]
