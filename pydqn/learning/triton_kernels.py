"""The Triton kernels of `fused_kernels`, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look_up_pixels(
    frames, rows, out, scale, shift, size, STACK: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr
):
    """Write PIXELS pixels of a sample, each of all frames of the stack: out is (B, size, STACK).

    WIDE is the power of two that holds STACK.
    """
    sample = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    image = tl.arange(0, WIDE)
    row = tl.load(rows + sample * STACK + image, mask=image < STACK, other=0).to(tl.int64)
    there = (pixel[:, None] < size) & (image[None, :] < STACK)
    values = tl.load(frames + row[None, :] * size + pixel[:, None], mask=there, other=0).to(tl.float32)
    start = sample.to(tl.int64) * size * STACK
    tl.store(out + start + pixel[:, None] * STACK + image[None, :], values * scale + shift, mask=there)


@triton.jit
def _values(advantages, value, row, action, ACTIONS: tl.constexpr, DUELING: tl.constexpr):
    """Return the action values of a row; those of actions that are none are of no use."""
    there = action < ACTIONS
    q = tl.load(advantages + row * ACTIONS + action, mask=there, other=0.0)
    if DUELING:
        q = tl.load(value + row) + q - tl.sum(tl.where(there, q, 0.0)) / ACTIONS
    return q


# Batches within a larger one begin anywhere: no second variant may have to be compiled during a capture.
@triton.jit(do_not_specialize_on_alignment=["actions", "rewards", "discounts", "weights"])
def td_slopes(
    online,
    online_value,
    target,
    target_value,
    actions,
    rewards,
    discounts,
    weights,
    values,
    errors,
    slopes,
    value_slopes,
    size,
    ACTIONS: tl.constexpr,
    WIDE: tl.constexpr,
    DUELING: tl.constexpr,
    DOUBLE: tl.constexpr,
    HUBER: tl.constexpr,
):
    """Of one sample: write its action values, its TD error and the slopes. WIDE is the power of two >= ACTIONS."""
    sample = tl.program_id(0)
    action = tl.arange(0, WIDE)
    there = action < ACTIONS
    q_tm1 = _values(online, online_value, sample, action, ACTIONS, DUELING)
    q_t = _values(target, target_value, sample, action, ACTIONS, DUELING)
    selector_t = q_t
    if DOUBLE:
        selector_t = _values(online, online_value, size + sample, action, ACTIONS, DUELING)
    # PyTorch's maximum is NaN where a value is, and so is the TD error: a run that diverged has to show it.
    known = selector_t == selector_t
    best = tl.argmax(tl.where(there & known, selector_t, float("-inf")), axis=0)
    next_value = tl.sum(tl.where(action == best, q_t, 0.0))
    next_value = tl.where(tl.sum(tl.where(there & ~known, 1, 0)) > 0, float("nan"), next_value)
    taken = tl.load(actions + sample)
    goal = tl.load(rewards + sample) + tl.load(discounts + sample) * next_value
    error = goal - tl.sum(tl.where(action == taken, q_tm1, 0.0))
    slope = 2 * error
    if HUBER:
        slope = tl.where(error != error, error, tl.minimum(tl.maximum(error, -1.0), 1.0))
    slope = -tl.load(weights + sample) * slope / size
    of_actions = tl.where(action == taken, slope, 0.0)
    if DUELING:
        of_actions -= slope / ACTIONS
    tl.store(values + sample * ACTIONS + action, q_tm1, mask=there)
    tl.store(slopes + sample * ACTIONS + action, of_actions, mask=there)
    tl.store(errors + sample, error)
    tl.store(value_slopes + sample, slope)
