"""Looks frames up by the numbers of their rows, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def look_up(frames: Tensor, rows: Tensor) -> Tensor:
    """Return (B, stack, *frame_shape) observations: those (B, stack) rows of (R, *frame_shape) frames."""
    words = as_words(frames).index_select(0, rows.flatten())
    return words.view(frames.dtype).view(*rows.shape, *frames.shape[1:])


def as_words(frames: Tensor) -> Tensor:
    """Return (R, *frame_shape) frames as (R, n) of the widest integers that their rows are whole numbers of.

    A view of the same memory. PyTorch's kernels are slow for tensors of more than 2^31 elements, and there are fewer
    words than pixels. It also lacks kernels for some dtypes (uint16, uint32), but not for these.
    """
    flat = frames.flatten(1)
    nbytes = flat.shape[1] * flat.element_size()
    kinds = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
    begins = flat.storage_offset() * flat.element_size()
    return flat.view(next(dtype for size, dtype in kinds if nbytes % size == 0 and begins % size == 0))
