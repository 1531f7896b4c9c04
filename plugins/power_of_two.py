"""Quantizer `power_of_two`: LSQ whose steps are powers of two, for hardware that rescales by shifting bits.

In a recipe: plugins: [plugins], and in a format: {quantizer: power_of_two}.
"""

from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.quantizers import LSQ


@plugins.register("quantizer", "power_of_two")
class PowerOfTwo(LSQ):
    """LSQ on the nearest power of two (in the logarithm) of the learned step."""

    def live_step(self) -> Tensor:
        """Return 2^round(log2(step)), (channels,); the gradient of the logarithm passes straight through."""
        exponent = self.step.clamp_min(2.0**-27).log2()
        return (exponent + (exponent.round() - exponent).detach()).exp2()
