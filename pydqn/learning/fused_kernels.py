"""Operations that PyTorch has only as chains of kernels: on a GPU one Triton kernel each, on a CPU what PyTorch has.

They are operators of PyTorch, `torch.ops.pydqn`, so that a trace, a capture and `torch.compile` know them. Triton comes
with PyTorch's builds for GPUs on Linux. It is imported, and compiles a kernel, when that is first launched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pydqn.learning.losses import LOSSES, td_error
from pydqn.replay.lookup import look_up

_PIXELS = 512  # of a program of the kernel; of each frame in the stack


@torch.library.custom_op(
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


@look_up_pixels.register_fake
def _(frames: Tensor, rows: Tensor, scale: float, shift: float) -> Tensor:
    shape = (*rows.shape, *frames.shape[1:])
    kind = torch.float32
    return torch.empty(shape, dtype=kind, device=frames.device, memory_format=torch.channels_last)


@look_up_pixels.register_kernel("cuda")
def _(frames: Tensor, rows: Tensor, scale: float, shift: float) -> Tensor:
    return launch_look_up_pixels(frames, rows, scale, shift)


@torch.library.custom_op(
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
    q = dueling(online)
    selector_t = q[size:] if len(q) > size else None
    values = q[:size].clone()
    errors = td_error(values, action, reward, discount, dueling(target), selector_t)
    slope = ((weight * LOSSES[loss].slope(errors)) / -size).unsqueeze(1)
    slopes = torch.zeros_like(values).scatter_(1, action.unsqueeze(1), slope)
    if len(online) > 1:
        slopes -= slope / values.shape[1]
    return values, errors, slopes, slope


@td_slopes.register_fake
def _(
    online: list[Tensor],
    target: list[Tensor],
    action: Tensor,
    reward: Tensor,
    discount: Tensor,
    weight: Tensor,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, errors = torch.empty_like(target[0]), torch.empty_like(reward)
    return values, errors, torch.empty_like(values), errors.new_empty((len(action), 1))


@td_slopes.register_kernel("cuda")
def _(
    online: list[Tensor],
    target: list[Tensor],
    action: Tensor,
    reward: Tensor,
    discount: Tensor,
    weight: Tensor,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_td_slopes(online, target, action, reward, discount, weight, loss)


def dueling(outputs: list[Tensor]) -> Tensor:
    """Return (N, A) action values of a network's outputs (Wang et al. 2016, equation 9)."""
    advantages, *value = outputs
    return advantages if not value else value[0] + advantages - advantages.mean(dim=1, keepdim=True)


def launch_look_up_pixels(frames: Tensor, rows: Tensor, scale: float, shift: float) -> Tensor:
    """See `look_up_pixels`; launches the Triton kernel, also where an interpreter stands in for a GPU."""
    batch, stack = rows.shape
    height, width = frames.shape[1:]
    out = torch.empty((batch, height, width, stack), dtype=torch.float32, device=frames.device)
    grid = (batch, -(-height * width // _PIXELS))
    _kernels()["pixels"][grid](
        frames, rows, out, scale, shift, height * width, STACK=stack, WIDE=_power_of_two(stack), PIXELS=_PIXELS
    )
    return out.permute(0, 3, 1, 2)


def launch_td_slopes(
    online: list[Tensor],
    target: list[Tensor],
    action: Tensor,
    reward: Tensor,
    discount: Tensor,
    weight: Tensor,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `td_slopes`; launches the Triton kernel, also where an interpreter stands in for a GPU."""
    size, actions = target[0].shape
    values, slopes, errors, slope = (reward.new_empty(shape) for shape in ((size, actions),) * 2 + ((size,), (size, 1)))
    _kernels()["slopes"][(size,)](
        *(online[0], online[-1], target[0], target[-1], action, reward, discount, weight),
        *(values, errors, slopes, slope),
        size,
        ACTIONS=actions,
        WIDE=_power_of_two(actions),
        DUELING=len(online) > 1,
        DOUBLE=len(online[0]) > size,
        HUBER={"huber": True, "mse": False}[loss],
    )
    return values, errors, slopes, slope


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@functools.cache
def _kernels() -> dict[str, Any]:
    from pydqn.learning import triton_kernels  # Triton is imported where there is a GPU, and only when it is needed

    return {"pixels": triton_kernels.look_up_pixels, "slopes": triton_kernels.td_slopes}
