"""Second moments of the inputs of a layer, in the full-precision and in the quantized network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fpq_lightning.utils import distributed


@dataclass
class Moments:
    """Weighted sums over positions of a layer's inputs: what the rows of its weight are multiplied with.

    A convolution with groups has inputs of its own for each of them; other layers have one group.

    Attributes:
        weight: sum of the weights, float64 `[]`.
        x: sum of the full-precision inputs, float64 `[groups, n]`.
        y: sum of the quantized network's inputs, float64 `[groups, n]`.
        yy: sum of ``y y^T``, float32 `[groups, n, n]`.
        xy: sum of ``x y^T``, float32 `[groups, n, n]`.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, groups: int, n: int, device: torch.device) -> Moments:
        """Moments of no positions."""
        sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (groups, n), (groups, n))]
        return cls(*sums, *(torch.zeros(groups, n, n, device=device) for _ in range(2)))

    @staticmethod
    def size(groups: int, n: int) -> int:
        """Bytes that moments take."""
        return 8 * groups * n * (n + 2)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Adds positions.

        Args:
            x: full-precision inputs, `[m, groups, n]`.
            y: the quantized network's inputs at the same positions, `[m, groups, n]`.
            weights: of the positions, `[m]`.
        """
        x, y = x.float().transpose(0, 1), y.float().transpose(0, 1)
        weighted = y * weights.float()[:, None]
        self.weight += weights.double().sum()
        self.x += (x * weights.float()[:, None]).sum(1)
        self.y += weighted.sum(1)
        self.yy.baddbmm_(y.mT, weighted)
        self.xy.baddbmm_(x.mT, weighted)

    def sum_over_ranks(self) -> None:
        """Adds the positions that other processes saw."""
        for tensor in (self.weight, self.x, self.y, self.yy, self.xy):
            distributed.sum_over_ranks(tensor)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of x and y, float64 `[groups, n]`."""
        return self.x / self.weight, self.y / self.weight

    def take_second(self, means: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Second moments ``E[y y^T]`` and ``E[x y^T]`` about some means of x and y, or about zero.

        They are in the memory of the sums, which are used up: nothing can be added any more.

        Args:
            means: float32 `[groups, n]` each; of other inputs, perhaps.
        """
        total = self.weight.float()
        found = self.yy.div_(total), self.xy.div_(total)
        self.yy = self.xy = self.yy.new_empty(0)
        if means is not None:
            own_x, own_y = (mean.float() for mean in self.means)
            x, y = means
            for matrix, own, about in zip(found, (own_y, own_x), (y, x), strict=True):
                matrix.baddbmm_(own[:, :, None], y[:, None], alpha=-1)
                matrix.baddbmm_(about[:, :, None], (own_y - y)[:, None], alpha=-1)
        return found

    def mean_shift(self, weight: Tensor, q: Tensor) -> Tensor:
        """The difference that a weight `q` on y makes to the mean output of `weight` on x, float32 `[out]`."""
        x, y = self.means
        rows = (w.double().unflatten(0, (len(x), -1)) for w in (weight, q))
        full, other = (r @ mean[..., None] for r, mean in zip(rows, (x, y), strict=True))
        return (full - other).flatten().float()

    @property
    def are_usable(self) -> bool:
        """Whether there were positions, and all sums and the products of means are finite."""
        if not self.weight > 0:
            return False
        products = [mean.float().square() for mean in self.means]
        return all(bool(t.isfinite().all()) for t in (self.yy, self.xy, *products))
