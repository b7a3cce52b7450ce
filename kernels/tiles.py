"""What the Triton kernels share: block sizes, the product of one tile, and the slopes of silu.

Block sizes are pure functions of one user's shape and dtype. Nothing is autotuned: a trial run of a kernel that writes
in place would change live memory. Nothing depends on how many users a launch has either, so that a user's bits are the
same in any company: tiles of 64 rows and more all take the same matrix instruction and sum in the same order.

Names inside kernels: a pointer has the name of what it points at; `row`, `column`, `inner` are vectors of indices of
a tile, [ROWS], [COLUMNS], [INNER]; capitals are compile-time sizes; a user's tiles stand `down` x `across`. Programs
are numbered across, then down, then by user: neighbours share a user's weights in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))
"""Kernels run as NumPy on the CPU. A product there takes the bits of bfloat16 as integers, so it needs float32."""

COLUMN_TILE_MAX = 8192
"""Elements of a tile of gathered columns: 64 registers a thread in float32 with 128 threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A tile of a product, and how many warps, load stages and registers a thread serve it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None

    def sizes(self, inner: str = "INNER") -> dict[str, int | None]:
        """As a kernel takes them, the summed axis under the name `inner`."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            inner: self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


def power_of_two(size: int) -> int:
    """The smallest that holds `size`."""
    return 1 << (size - 1).bit_length()


def padded(size: int, smallest: int, largest: int) -> int:
    """The power of two that holds `size`, between two powers of two."""
    return max(smallest, min(largest, power_of_two(size)))


def blocks_of(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def product_blocks(rows: int, columns: int, inner: int, dtype: torch.dtype) -> Blocks:
    """Tiles of a product of activations [rows, inner] with weights [inner, columns].

    16 bits: 128 x 128 accumulators in 8 warps (64 registers a thread) with 3 stages of 32 KB and 128 registers a
    thread at most, so that two programs share a multiprocessor of Hopper and one's epilogue hides behind the other's
    loop. float32 goes through ordinary multiply-adds, where a larger tile would spill.
    """
    if dtype.itemsize > 2:
        return Blocks(
            rows=64, columns=padded(columns, 16, 64), inner=padded(inner, 16, 32), warps=4, stages=2
        )
    tall = 64 if rows <= 64 else 128
    even = columns % 16 == 0 and inner % 16 == 0  # otherwise every element has an address of its own
    return Blocks(
        rows=tall,
        columns=padded(columns, 16, 128),
        inner=padded(inner, 16, 64),
        warps=tall // 16,
        stages=3,
        registers=128 if even and tall == 128 else None,
    )


def outer_blocks(outs: int, ins: int, dtype: torch.dtype) -> Blocks:
    """Tiles of a sum of outer products over tokens: `rows` of outputs, `columns` of inputs, `inner` tokens at a time.

    Two accumulators of 128 x 128 in 8 warps are 128 registers a thread; tokens always come 64 (32) at a time, so
    that padding a chunk changes no bit.
    """
    if dtype.itemsize > 2:
        return Blocks(rows=padded(outs, 16, 64), columns=padded(ins, 16, 64), inner=32, warps=8, stages=2)
    return Blocks(rows=padded(outs, 16, 128), columns=padded(ins, 16, 128), inner=64, warps=8, stages=3)


def column_blocks(active: int, dim: int) -> tuple[int, int]:
    """(ACTIVE, DIM): all K columns of a code at once, and as much of their length as fits a tile."""
    ACTIVE = power_of_two(active)
    return ACTIVE, padded(dim, 16, max(16, min(128, COLUMN_TILE_MAX // ACTIVE)))


def row_blocks(width: int) -> tuple[int, int]:
    """(ROWS, WIDTH) of a kernel that holds whole rows: 4,096 elements, 32 a thread."""
    WIDTH = power_of_two(width)
    return max(1, min(64, 4096 // WIDTH)), WIDTH


def launch(kernel: Any, grid: tuple[int, ...], slab: Tensor, *arguments: object, **sizes: object) -> None:
    """Start a kernel where its first tensor lives; Triton by itself takes the current device."""
    if not slab.is_cuda or slab.device.index == torch.cuda.current_device():
        kernel[grid](slab, *arguments, **sizes)
        return
    with torch.cuda.device(slab.device):
        kernel[grid](slab, *arguments, **sizes)


def whole(tensor: Tensor) -> Tensor:
    """A slab that is written in place must not be copied, so its layout is asserted, not mended."""
    assert tensor.is_contiguous(), "a slab is one contiguous tensor"
    return tensor


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z):
    """Derivative of silu."""
    gate = tl.sigmoid(z)
    return gate * (1 + z * (1 - gate))


@triton.jit
def dot(left, right, total):
    """total + left @ right with a float32 accumulator; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def product_tile(
    left,
    right,
    row,
    column,
    rows,
    columns,
    inners,
    left_stride,
    right_inner_stride,
    right_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Σ_i left[row, i] right[i, column] in float32, [ROWS, COLUMNS]; rows and columns beyond the end give zeros.

    A tile without any row that counts runs no step of the loop. `right` is taken to the dtype of `left`.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    steps = tl.where(tl.min(row, 0) < rows, inners, 0)
    for start in range(0, steps, INNER):
        inner = start + tl.arange(0, INNER)
        left_tile = tl.load(
            left + row[:, None] * left_stride + inner[None, :],
            mask=(row[:, None] < rows) & (inner[None, :] < inners),
            other=0.0,
        )
        right_tile = tl.load(
            right + inner[:, None] * right_inner_stride + column[None, :] * right_column_stride,
            mask=(inner[:, None] < inners) & (column[None, :] < columns),
            other=0.0,
        )
        total = dot(left_tile, right_tile.to(left_tile.dtype), total)
    return total
