"""Dropout as the layers need it: the same zeros again in backward, without a mask of x kept in between.

On a CPU the places of the zeros are kept, or drawn again from the seed, and for the kernels of `cpu_bf16` a mask of bits; on a
GPU zeros are drawn where they are used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.kernels import cpu_bf16
from peftkit.kernels.base import triton_serves

REMEMBERED = 0.1
"""Up to this rate of dropout a CPU keeps the places of the zeros for backward, 4 bytes each, instead of drawing them again."""


def zeroed_places(count: int, p: float, seed: int) -> Tensor:
    """Which of `count` elements are dropped, each with probability p, in ascending order; the same ones for the same seed.

    The gaps between them are drawn (they are geometric): p * count random numbers instead of count.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    end, found = 0, [torch.empty(0, dtype=torch.int64, device="cpu")]
    while end < count:
        expected = (count - end) * p
        u = torch.rand(int(expected + 4 * math.sqrt(expected)) + 8, generator=generator, device="cpu", dtype=torch.float64 if p < 1e-4 else torch.float32)
        gaps = u.neg_().log1p_().mul_(1 / math.log1p(-p)).clamp_(max=count).to(torch.int64).add_(1)  # each at least 1
        position = gaps.cumsum_(0).add_(end - 1)
        found.append(position[: int(torch.searchsorted(position, count))])
        end = int(position[-1]) + 1
    return found[1] if len(found) == 2 else torch.cat(found)


class Dropout(NamedTuple):
    """d(x) of one tensor up to its factor 1 / (1 - p): on a CPU the places of the zeros or a mask, elsewhere the seed to draw them from."""

    p: float
    seed: int
    places: Tensor | None
    mask: Tensor | None = None
    """As `cpu_bf16.dropout_mask` makes it, for its kernels."""

    @classmethod
    def of(cls, x: Tensor, p: float, seed: int, kept: Tensor | None = None) -> Dropout:
        """Of a tensor like `x`; `kept` is what `to_keep` gave for the same seed."""
        if not p or x.device.type != "cpu":
            return cls(p, seed, None)
        if kept is not None:
            return cls(p, seed, None, kept) if kept.dtype == torch.uint8 else cls(p, seed, kept.to(torch.int64))
        if cpu_bf16.draws(x):
            return cls(p, seed, None, cpu_bf16.dropout_mask(x.numel(), p, seed))
        return cls(p, seed, zeroed_places(x.numel(), p, seed))

    @property
    def by_kernel(self) -> bool:
        """Whether the kernels of `cpu_bf16` can apply it."""
        return not self.p or self.mask is not None

    def without_mask(self) -> Dropout:
        """The same zeros for plain torch."""
        return self if self.mask is None else Dropout(self.p, self.seed, cpu_bf16.zeros_of(self.mask))

    def to_keep(self) -> Tensor | None:
        """What backward should be given, None where it is to draw anew."""
        if self.mask is not None:
            return self.mask
        if self.places is None or self.p > REMEMBERED:
            return None
        narrow = not len(self.places) or int(self.places[-1]) < 2**31  # they ascend
        return self.places.to(torch.int32 if narrow else torch.int64)

    def zero_(self, x: Tensor) -> Tensor:
        """Zeroes the dropped elements of the contiguous `x` in place."""
        if self.mask is not None:
            if cpu_bf16.memory_is_ours(x):
                return cpu_bf16.dropped(x, self.mask, out=x)
            return self.without_mask().zero_(x)
        if self.places is not None:
            x.view(-1).index_fill_(0, self.places, 0)
        elif self._by_triton(x):
            _triton().drop(x, self.p, self.seed, out=x)
        elif self.p:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            x.mul_(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p, generator=generator))
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """x with the dropped elements zero: a new contiguous tensor, or x itself where nothing is dropped."""
        if self._by_triton(x):
            return _triton().drop(x.contiguous(), self.p, self.seed)
        return self.zero_(x.clone(memory_format=torch.contiguous_format)) if self.p else x

    def add_to_(self, y: Tensor, update: Tensor) -> Tensor:
        """y <- y + d(update), in place, for a contiguous y like the update, which is used up."""
        if self._by_triton(update):
            return _triton().add_(y, update, self.p, self.seed)
        return y.add_(self.zero_(update))

    def of_both(self, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
        """d(x), and y <- y + d(update) in place, for a contiguous y like x and the update, which is used up."""
        if self._by_triton(x):
            return _triton().drop_and_add_(x.contiguous(), y, update, self.p, self.seed)
        self.add_to_(y, update)
        return self(x)

    def _by_triton(self, x: Tensor) -> bool:
        return bool(self.p) and self.places is None and triton_serves(x, 1)


def _triton() -> Any:
    """The kernels for GPUs, imported at their first use there."""
    from peftkit.kernels import triton_dropout

    return triton_dropout


def draw_seed(dropout: float) -> int:
    """A seed for one dropout mask, drawn from torch's generator where there is dropout."""
    return int(torch.randint(2**62, (), device="cpu")) if dropout else 0
