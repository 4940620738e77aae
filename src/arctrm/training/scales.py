"""By how much the grids of a training row are shown larger: scale augmentation, on the device.

A scale is a number: 0 shows a pair as it is, k > 0 by the k-th of the configured factors. Without a
host sync, so that a captured CUDA graph can replay it.

Legend: n drawn rows.
"""

import torch
from torch import Tensor

from arctrm.config.scaling import ScalingConfig


class Scales:
    """The factors of `config` on `device`, and how rows come by one; none where not `enabled`."""

    def __init__(self, config: ScalingConfig, device: torch.device, enabled: bool):
        self.config, self.device = config, device
        self.enabled = enabled and config.share > 0
        self.factors = torch.tensor([(1, 1), *config.factors], device=device)

    def draw(self, height: Tensor, width: Tensor) -> Tensor:
        """Scales int64 [n], if enabled, of rows whose largest sides are `height`, `width` [n]."""
        count = height.shape[0]
        scale = torch.rand(count, len(self.factors) - 1, device=self.device).argmax(1) + 1
        is_larger = torch.rand(count, device=self.device) < self.config.share
        sides = torch.maximum(*self.larger(height, width, scale))
        return torch.where(is_larger & (sides <= self.config.sides), scale, 0)

    def larger(self, height: Tensor, width: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [n] as they are shown."""
        if not self.enabled:
            return height, width
        rows, columns = self.factors[scale].unbind(1)
        return height * rows, width * columns

    def cells(self, y: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of the grids themselves that stand at (y, x) [n] where they are shown."""
        if not self.enabled:
            return y, x
        rows, columns = self.factors[scale].unbind(1)
        return y // rows, x // columns
