"""Frozen weights of projections that read one input: one matmul for all where they lie in one memory, in whatever form they are.

They are dense, in four bits (made dense when their matmul comes, and freed after it) or in fp8 (multiplied as they are). A
low-rank factor may multiply along as more rows of the weights: `lay_in_a_row` leaves room for them.

Shape legend: N tokens, H features in, O features out, R ranks of all projections.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from axolotl.kernels.fp8 import matmul_fp8, quantize_rows
from axolotl.kernels.quantize import NUM_STATE_TENSORS, dequantize_parts

LowRank = tuple[torch.Tensor, torch.Tensor]  # (N, R) and (R, columns)


class FrozenWeights:
    """The frozen weights of an operator, each given dense when its matmul comes.

    Args:
        weights: as they are stored, (O, H) or packed.
        state: what their quantization states hold, without the absent tensors, one after the other.
        layout: per weight, the numbers of its quantization state, then which of its tensors are present, as bits.
    """

    def __init__(self, weights: list[torch.Tensor], state: list[torch.Tensor], layout: list[int]):
        self.stored = weights
        self.states: list[tuple[list[torch.Tensor | None], list[int]] | None] = []
        self.sizes = rows_of(weights, layout)
        each = len(layout) // len(weights)
        tensors = iter(state)
        for start in range(0, len(layout), each):
            *numbers, present = layout[start : start + each]
            own = [next(tensors) if present >> bit & 1 else None for bit in range(NUM_STATE_TENSORS)]
            self.states.append((own, numbers) if present else None)

    # A low-rank term comes first, and the matmul of the weights adds to it as it writes: the other way round the output would be
    # read and written once more.

    def product(self, x: torch.Tensor, low_rank: LowRank | None = None) -> torch.Tensor:
        """`x [W_0; W_1; ...]^T` (N, O_0 + O_1 + ...), plus the product of the two factors of `low_rank`."""
        low_rank = _unless_empty(low_rank)
        if (fp8 := self._fp8()) is not None:
            scale = torch.cat([own[0] for own in fp8], dim=1) if len(fp8) > 1 else fp8[0][0]
            y = matmul_fp8(*quantize_rows(x), stack(self.stored), scale, x.dtype)
            return y if low_rank is None else y.addmm_(*low_rank)
        whole = self._whole(x.dtype)
        if whole is not None:
            return x @ whole.t() if low_rank is None else torch.mm(*low_rank).addmm_(x, whole.t())
        y = x.new_empty(x.shape[0], sum(self.sizes)) if low_rank is None else torch.mm(*low_rank)
        for index, part in enumerate(y.split(self.sizes, dim=1)):
            part.addmm_(x, self._dense(index, x.dtype).t(), beta=0 if low_rank is None else 1)
        return y

    def product_back(self, grad: torch.Tensor, low_rank: LowRank | None = None) -> torch.Tensor:
        """`grad [W_0; W_1; ...]` (N, H) for a gradient (N, O_0 + O_1 + ...), plus the product of the factors of `low_rank`."""
        low_rank = _unless_empty(low_rank)
        if (fp8 := self._fp8()) is not None:
            grad_x = matmul_fp8(*quantize_rows(grad), fp8[0][1], fp8[0][2], grad.dtype)
            return grad_x if low_rank is None else grad_x.addmm_(*low_rank)
        whole = self._whole(grad.dtype)
        if whole is not None:
            return grad @ whole if low_rank is None else torch.mm(*low_rank).addmm_(grad, whole)
        grad_x = None if low_rank is None else torch.mm(*low_rank)
        for index, part in enumerate(grad.split(self.sizes, dim=1)):
            dense = self._dense(index, grad.dtype)
            grad_x = part @ dense if grad_x is None else grad_x.addmm_(part, dense)
            del dense
        assert grad_x is not None
        return grad_x

    # Where the low-rank input comes out, or its gradient goes in, side by side with the others, its factor multiplies as more rows
    # of the weights.

    def product_with(self, x: torch.Tensor, a: torch.Tensor, room: int) -> torch.Tensor:
        """`x [W_0; W_1; ...; a]^T` (N, O_0 + O_1 + ... + R) for a (R, H); `room` as in `_whole`."""
        whole = self._whole(x.dtype, a, room)
        if whole is not None:
            return x @ whole.t()
        y = x.new_empty(x.shape[0], sum(self.sizes) + a.shape[0])
        *parts, low = y.split([*self.sizes, a.shape[0]], dim=1)
        torch.mm(x, a.t(), out=low)
        if (fp8 := self._fp8()) is not None:
            scale = torch.cat([own[0] for own in fp8], dim=1) if len(fp8) > 1 else fp8[0][0]
            matmul_fp8(*quantize_rows(x), stack(self.stored), scale, x.dtype, out=y[:, : sum(self.sizes)])
            return y
        for index, part in enumerate(parts):
            torch.mm(x, self._dense(index, x.dtype).t(), out=part)
        return y

    def product_back_with(self, grad: torch.Tensor, a: torch.Tensor, room: int) -> torch.Tensor:
        """`grad [W_0; W_1; ...; a]` (N, H) for a gradient (N, O_0 + O_1 + ... + R)."""
        whole = self._whole(grad.dtype, a, room)
        if whole is not None:
            return grad @ whole
        grad_y, grad_low = grad.split([sum(self.sizes), a.shape[0]], dim=1)
        return self.product_back(grad_y, (grad_low, a))

    def _fp8(self) -> list[Any] | None:
        """The tensors of each `Fp8State`, or None when the weights are not in fp8."""
        if self.states[0] is None or self.states[0][1][2] != 0:
            return None
        return [state[0] for state in self.states if state is not None]

    def _dense(self, index: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """(O, H) in `dtype`: the weight itself, or a temporary (`out`, if given) when it is stored in four bits."""
        state = self.states[index]
        if state is None:
            return self.stored[index].to(dtype)
        return dequantize_parts(self.stored[index], *state, dtype, out)

    def _whole(self, dtype: torch.dtype, below: torch.Tensor | None = None, room: int = 0) -> torch.Tensor | None:
        """All weights as (O_0 + O_1 + ..., H), or None when that would take a copy of dense ones.

        Args:
            dtype: of the result.
            below: more rows (R, H), or None.
            room: rows that `lay_in_a_row` left below the weights, and that nobody else reads.
        """
        if self._fp8() is not None:
            return None
        if below is None or not below.shape[0]:
            if len(self.stored) == 1:
                return self._dense(0, dtype)
            below = self.stored[0].new_empty(0, 0)
        rows, more = sum(self.sizes), below.shape[0]
        if all(state is not None for state in self.states):
            assert self.states[0] is not None
            whole = torch.empty(rows + more, self.states[0][1][1], dtype=dtype, device=self.stored[0].device)
            for index, part in enumerate(whole[:rows].split(self.sizes)):
                self._dense(index, dtype, part)
        else:
            dense = self.states == [None] * len(self.stored) and self.stored[0].dtype == dtype
            if not dense or not lie_in_a_row(self.stored) or (more and not _has_room(self.stored, more, room)):
                return None
            # What lies below the weights is no part of them: autograd shall not see them change.
            whole = stack([weight.data for weight in self.stored], more)
        if more:
            whole[rows:] = below
        return whole


def _unless_empty(low_rank: LowRank | None) -> LowRank | None:
    return low_rank if low_rank is not None and low_rank[0].shape[1] else None


def lie_in_a_row(weights: list[torch.Tensor]) -> bool:
    """Whether each weight begins in memory where the one before it ends."""
    return all(
        one.dtype == other.dtype
        and one.is_contiguous()
        and other.is_contiguous()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and other.storage_offset() == one.storage_offset() + one.numel()
        for one, other in itertools.pairwise(weights)
    )


def stack(weights: list[torch.Tensor], more: int = 0) -> torch.Tensor:
    """The weights one below the other, without a copy where they lie so; with `more` rows that follow them in memory."""
    if len(weights) == 1 and not more:
        return weights[0]
    if not lie_in_a_row(weights):
        return torch.cat(weights)
    rows = sum(weight.shape[0] for weight in weights) + more
    return weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())


def _has_room(weights: list[torch.Tensor], rows: int, room: int) -> bool:
    """Whether weights that lie in a row are still where `lay_in_a_row` put them, with room for `rows` more."""
    first, columns = weights[0], weights[0].shape[1]
    size = (sum(weight.shape[0] for weight in weights) + room) * columns * first.element_size()
    return rows <= room and first.storage_offset() == 0 and first.untyped_storage().nbytes() == size


def rows_of(weights: list[torch.Tensor], layout: list[int]) -> list[int]:
    """Output features of each weight of an operator."""
    each = len(layout) // len(weights)
    return [layout[index * each] or weight.shape[0] for index, weight in enumerate(weights)]


def round_up_rank(rank: int, *, alone: bool = False) -> int:
    """So that rows which hold a low-rank input beside something else are 32 bytes apart in half precision.

    Args:
        rank: of the adapters of all projections.
        alone: whether there is one projection. Where the number of its outputs is a multiple of 64, cuBLAS takes tiles that make
            its matmul 4 to 5 percent faster on an H200; the wider ones of several gain nothing.
    """
    multiple = 64 if alone else 16
    return -(-rank // multiple) * multiple


def lay_in_a_row(weights: list[torch.nn.Parameter], room: int = 0) -> None:
    """Give dense weights of one width and dtype one memory, so that they multiply in one matmul.

    Args:
        weights: (O_i, H) each. Changed in place.
        room: rows to leave below the last one.
    """
    sizes = [weight.shape[0] for weight in weights]
    rows = torch.cat([*(weight.data for weight in weights), weights[0].data.new_zeros(room, weights[0].shape[1])])
    for weight, part in zip(weights, rows.split([*sizes, room]), strict=False):
        weight.data = part
