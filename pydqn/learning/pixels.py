"""The conversion of pixels from the replay buffer to the input of a convolution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydqn._util.jit import kernel

_STACK = 4  # images that the kernel interleaves; LLVM vectorizes the loop because it is a constant


def to_channels_last(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 images to floating point and to channels-last, values unchanged.

    For the usual stack of four on a CPU, a compiled loop does this in one pass; PyTorch takes more than twice as long
    for a conversion and a transposition. Everything else goes through PyTorch, and so does a traced call
    (`torch.export`, `torch.jit.trace`, ONNX and the like).

    Args:
        images: (B, C, H, W) uint8; each sample's images contiguous.
        dtype: float32 or bfloat16; both hold all values of uint8 exactly.

    Returns:
        (B, C, H, W) of that dtype, channels-last.
    """
    batch, channels, height, width = images.shape
    if is_traced() or images.device.type != "cpu" or images.dtype != torch.uint8 or channels != _STACK or not batch:
        # One call for both would take twice as long.
        return images.to(dtype).contiguous(memory_format=torch.channels_last)
    size, stride = height * width, images.stride(0)
    if images.stride()[1:] != (size, width, 1):
        images, stride = images.contiguous(), channels * size
    # Samples may lie apart (as in the replay buffer's batches), but LLVM vectorizes loops over one contiguous array.
    flat = torch.as_strided(images, ((batch - 1) * stride + channels * size,), (1,)).numpy()
    pixels = torch.empty((batch, height, width, channels), dtype=dtype, device="cpu")
    if dtype == torch.bfloat16:
        _to_bfloat16(flat, stride, pixels.view(torch.int16).numpy().view(np.uint16).reshape(batch, -1), size)
    else:
        _to_float32(flat, stride, pixels.numpy().reshape(batch, -1), size)
    return pixels.permute(0, 3, 1, 2)


def is_traced() -> bool:
    """Return whether PyTorch traces operations, beside or instead of carrying them out."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@kernel(nogil=True)
def _uint8_to_float32(images, out):
    for i in range(out.size):
        out[i] = images[i]


@kernel(nogil=True)
def _interleave(images, out):
    size = images.size // _STACK
    a, b, c, d = images[:size], images[size : 2 * size], images[2 * size : 3 * size], images[3 * size :]
    for i in range(size):
        out[_STACK * i] = a[i]
        out[_STACK * i + 1] = b[i]
        out[_STACK * i + 2] = c[i]
        out[_STACK * i + 3] = d[i]


@kernel(nogil=True)
def _interleave_upper(images, out):
    """As `_interleave`, from float32 to bfloat16, as bits: the upper half, which holds integers below 256 exactly."""
    size = images.size // _STACK
    a, b, c, d = images[:size], images[size : 2 * size], images[2 * size : 3 * size], images[3 * size :]
    half = np.uint32(16)
    for i in range(size):
        out[_STACK * i] = a[i] >> half
        out[_STACK * i + 1] = b[i] >> half
        out[_STACK * i + 2] = c[i] >> half
        out[_STACK * i + 3] = d[i] >> half


@kernel(nogil=True)
def _to_float32(flat, stride, out, size):
    for sample in range(out.shape[0]):
        start = sample * stride
        _interleave(flat[start : start + _STACK * size], out[sample])


@kernel(nogil=True)
def _to_bfloat16(flat, stride, out, size):
    wide = np.empty(_STACK * size, np.float32)
    for sample in range(out.shape[0]):
        start = sample * stride
        _uint8_to_float32(flat[start : start + _STACK * size], wide)
        _interleave_upper(wide.view(np.uint32), out[sample])
