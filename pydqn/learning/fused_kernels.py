"""Operations that PyTorch has only as chains of kernels: on a GPU one Triton kernel each, on a CPU what PyTorch has.

They are operators of PyTorch, `torch.ops.pydqn`, so that a trace, a capture and `torch.compile` know them. Triton comes
with PyTorch's builds for GPUs on Linux. It is imported, and compiles a kernel, when that is first launched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library

from pydqn.learning.heads import dueling
from pydqn.learning.losses import LOSSES, td_error
from pydqn.replay.lookup import look_up

_PIXELS = 512  # of a program of the kernel; of each frame in the stack


@library.custom_op(
    "pydqn::look_up_pixels",
    mutates_args=(),
    schema="(Tensor frames, Tensor rows, float scale, float shift) -> Tensor",
)
def look_up_pixels(frames: Tensor, rows: Tensor, scale: float, shift: float) -> Tensor:
    """Look frames up, scale their pixels, and lay them out as convolutions want them.

    Args:
        frames: (R, H, W) uint8.
        rows: (B, stack) int32 numbers of rows of `frames`.
        scale: pixels are multiplied by this.
        shift: then this is added.

    Returns:
        (B, stack, H, W) float32, channels-last.
    """
    pixels = look_up(frames, rows).to(torch.float32).contiguous(memory_format=torch.channels_last)
    return pixels.mul_(scale).add_(shift)


def launch_look_up_pixels(frames: Tensor, rows: Tensor, scale: float, shift: float) -> Tensor:
    """See `look_up_pixels`; launches the Triton kernel, also where an interpreter stands in for a GPU."""
    (batch, stack), pixels = rows.shape, frames.shape[1] * frames.shape[2]
    out = _images(frames, rows)
    sizes = {"STACK": stack, "WIDE": _power_of_two(stack), "PIXELS": _PIXELS}
    _kernels()["pixels"][(batch, -(-pixels // _PIXELS))](frames, rows, out, scale, shift, pixels, **sizes)
    return out


def _images(frames: Tensor, rows: Tensor, *_: float) -> Tensor:
    """Return memory for what `look_up_pixels` returns."""
    shape, layout = (*rows.shape, *frames.shape[1:]), torch.channels_last
    return torch.empty(shape, dtype=torch.float32, device=frames.device, memory_format=layout)


@library.custom_op(
    "pydqn::td_slopes",
    mutates_args=(),
    schema="(Tensor[] online, Tensor[] target, Tensor action, Tensor reward, Tensor discount, Tensor weight, str loss)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def td_slopes(
    online: list[Tensor],
    target: list[Tensor],
    action: Tensor,
    reward: Tensor,
    discount: Tensor,
    weight: Tensor,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return action values, TD errors, and the slopes of the weighted mean loss in the online network's outputs.

    Args:
        online: the outputs of the online network: (N, A) advantages, or values if that is all; with dueling then
            (N, 1) values. N is B, the samples' observations, or 2B for double Q-learning: these, and the next ones.
        target: the outputs of the target network for the B next observations.
        action: (B,) int64.
        reward: (B,) float32.
        discount: (B,) float32.
        weight: (B,) float32 importance weights.
        loss: a name in `LOSSES`.

    Returns:
        (B, A) action values of the online network, (B,) TD errors, (B, A) slopes in the first output, and (B, 1) in the
        second (without dueling, of no use).
    """
    size = len(action)
    q = dueling(*online)
    selector_t = q[size:] if len(q) > size else None
    values = q[:size].clone()
    errors = td_error(values, action, reward, discount, dueling(*target), selector_t)
    slope = ((weight * LOSSES[loss].slope(errors)) / -size).unsqueeze(1)
    slopes = torch.zeros_like(values).scatter_(1, action.unsqueeze(1), slope)
    if len(online) > 1:
        slopes -= slope / values.shape[1]
    return values, errors, slopes, slope


def launch_td_slopes(
    online: list[Tensor], target: list[Tensor], *batch_and_loss: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `td_slopes`; launches the Triton kernel, also where an interpreter stands in for a GPU."""
    *batch, loss = batch_and_loss
    size, actions = target[0].shape
    written = _slopes(online, target)
    _kernels()["slopes"][(size,)](
        *(online[0], online[-1], target[0], target[-1], *batch, *written, size),
        ACTIONS=actions,
        WIDE=_power_of_two(actions),
        DUELING=len(online) > 1,
        DOUBLE=len(online[0]) > size,
        HUBER={"huber": True, "mse": False}[loss],
    )
    return written


def _slopes(online: list[Tensor], target: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for what `td_slopes` returns."""
    size, actions = target[0].shape
    new = target[0].new_empty
    return new((size, actions)), new(size), new((size, actions)), new((size, 1))


look_up_pixels.register_fake(_images)
look_up_pixels.register_kernel("cuda", launch_look_up_pixels)
td_slopes.register_fake(_slopes)
td_slopes.register_kernel("cuda", launch_td_slopes)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@functools.cache
def _kernels() -> dict[str, Any]:
    from pydqn.learning import triton_kernels  # Triton is imported where there is a GPU, and only when it is needed

    return {"pixels": triton_kernels.look_up_pixels, "slopes": triton_kernels.td_slopes}
