"""Compiled loops for an optimizer's step on a CPU; `pydqn.learning.optimizers` has the formulas."""

from __future__ import annotations

import numpy as np

from pydqn._util.jit import kernel

_BLOCK = 4096  # numbers that are converted, changed and rounded while they are in the first-level cache
BETA1, BETA2 = 0.9, 0.999  # of Adam

# Each loop is short and a function of its own, so that LLVM vectorizes it. A division that may raise would prevent it,
# hence error_model="numpy".


@kernel(nogil=True)
def _bfloat16_to_float32(bits, out):
    """Convert, both as their bits: a bfloat16 is the upper half of a float32."""
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@kernel(nogil=True)
def float32_to_bfloat16(bits, out):
    """Round to nearest, ties to even, both as their bits (a NaN may become infinite). `out` may be empty."""
    for i in range(out.size):
        b = bits[i]
        out[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel(nogil=True)
def _float32(grad, buffer):
    """Return a block of a gradient as float32."""
    if grad.itemsize == 2:
        _bfloat16_to_float32(grad, buffer.view(np.uint32))
        return buffer[: grad.size]
    return grad.view(np.float32)


@kernel(nogil=True, fastmath={"reassoc", "contract"})  # in any order; NaN stays NaN
def _squares(grad):
    total = np.float32(0)
    for i in range(grad.size):
        total += grad[i] * grad[i]
    return total


@kernel(nogil=True)
def sum_of_squares(grad):
    """Return the sum of squares of float32 numbers, or of bfloat16 numbers as their bits."""
    buffer = np.empty(_BLOCK, np.float32)
    total = 0.0
    for start in range(0, grad.size, _BLOCK):
        total += _squares(_float32(grad[start : start + _BLOCK], buffer))
    return total


@kernel(nogil=True, error_model="numpy")
def _adam_block(grad, parameter, mean, square, scale, size, root, epsilon, kept):
    b1, b2, c2 = np.float32(1 - BETA1), np.float32(BETA2), np.float32(1 - BETA2)
    for i in range(parameter.size):
        g = grad[i] * scale
        m = mean[i] + b1 * (g - mean[i])
        s = square[i] * b2 + c2 * g * g
        mean[i] = m
        square[i] = s
        parameter[i] = kept * parameter[i] - size * m / (np.sqrt(s) / root + epsilon)


@kernel(nogil=True)
def adam(grad, parameter, copy, mean, square, scale, size, root, epsilon, kept):
    """Take a step of Adam with the gradient times `scale`, and round the parameter into `copy`, unless that is empty.

    `size` is lr / (1 - beta1^t), `root` is sqrt(1 - beta2^t), and `kept` the share that the decay leaves of weights.
    """
    buffer = np.empty(_BLOCK, np.float32)
    for a in range(0, parameter.size, _BLOCK):
        b = min(a + _BLOCK, parameter.size)
        g = _float32(grad[a:b], buffer)
        _adam_block(g, parameter[a:b], mean[a:b], square[a:b], scale, size, root, epsilon, kept)
        float32_to_bfloat16(parameter[a:b].view(np.uint32), copy[a:b])


@kernel(nogil=True, error_model="numpy")
def _rmsprop_block(
    grad, parameter, square, mean, change, scale, rate_before, rate_after, decay, epsilon, momentum, outside
):
    one = np.float32(1)
    for i in range(parameter.size):
        g = grad[i] * scale
        s = square[i] * decay + (one - decay) * g * g
        square[i] = s
        if mean.size:
            m = mean[i] + (one - decay) * (g - mean[i])
            mean[i] = m
            s -= m * m
        d = rate_before * g / (np.sqrt(s) + epsilon if outside else np.sqrt(s + epsilon))
        if change.size:
            d += momentum * change[i]
            change[i] = d
        parameter[i] -= rate_after * d


@kernel(nogil=True)
def rmsprop(grad, parameter, copy, square, mean, change, *numbers):
    """Take a step of RMSProp: centered unless `mean` is empty, with momentum unless `change` is empty."""
    buffer = np.empty(_BLOCK, np.float32)
    for a in range(0, parameter.size, _BLOCK):
        b = min(a + _BLOCK, parameter.size)
        g = _float32(grad[a:b], buffer)
        _rmsprop_block(g, parameter[a:b], square[a:b], mean[a:b], change[a:b], *numbers)
        float32_to_bfloat16(parameter[a:b].view(np.uint32), copy[a:b])
