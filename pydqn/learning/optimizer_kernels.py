"""Loops over float32 numbers that take an optimizer's step, and what goes with one, on a CPU."""

from __future__ import annotations

import numpy as np

from pydqn._util.jit import kernel

_BLOCK = 4096  # numbers that are widened, stepped and rounded while they are in the first-level cache
BETA1, BETA2 = 0.9, 0.999  # Adam's

# Each loop below is short and on its own, so that LLVM turns it into vector instructions. A division that may raise
# would stop that: error_model="numpy".


@kernel(nogil=True)
def _widen(half, out):
    """The upper half of a float32's bits, and zeros."""
    for i in range(half.size):
        out[i] = np.uint32(half[i]) << np.uint32(16)


@kernel(nogil=True)
def narrow(bits, out):
    """Round float32 to the nearest bfloat16, ties to even (a NaN may become infinite). Nothing where `out` is empty."""
    for i in range(out.size):
        b = bits[i]
        out[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel(nogil=True)
def _float32(grad, buffer):
    """A block of a gradient as float32."""
    if grad.itemsize == 2:
        _widen(grad, buffer.view(np.uint32))
        return buffer[: grad.size]
    return grad.view(np.float32)


@kernel(nogil=True, fastmath={"reassoc", "contract"})  # in any order; a NaN stays one
def _squares(grad):
    total = np.float32(0)
    for i in range(grad.size):
        total += grad[i] * grad[i]
    return total


@kernel(nogil=True)
def sum_of_squares(grad):
    """Return that of a row of float32, or of bfloat16 as its bits."""
    buffer = np.empty(_BLOCK, np.float32)
    total = 0.0
    for start in range(0, grad.size, _BLOCK):
        total += _squares(_float32(grad[start : start + _BLOCK], buffer))
    return total


@kernel(nogil=True, error_model="numpy")
def _adam_block(grad, parameter, mean, square, scale, size, root, epsilon):
    b1, b2, c2 = np.float32(1 - BETA1), np.float32(BETA2), np.float32(1 - BETA2)
    for i in range(parameter.size):
        g = grad[i] * scale
        m = mean[i] + b1 * (g - mean[i])
        s = square[i] * b2 + c2 * g * g
        mean[i] = m
        square[i] = s
        parameter[i] -= size * m / (np.sqrt(s) / root + epsilon)


@kernel(nogil=True)
def adam(grad, parameter, copy, mean, square, scale, size, root, epsilon):
    """Take a step of Adam with the gradient times `scale`, and round the parameter into its copy, if there is one."""
    buffer = np.empty(_BLOCK, np.float32)
    for a in range(0, parameter.size, _BLOCK):
        b = min(a + _BLOCK, parameter.size)
        g = _float32(grad[a:b], buffer)
        _adam_block(g, parameter[a:b], mean[a:b], square[a:b], scale, size, root, epsilon)
        narrow(parameter[a:b].view(np.uint32), copy[a:b])


@kernel(nogil=True, error_model="numpy")
def _rmsprop_block(grad, parameter, square, mean, change, scale, within, behind, decay, epsilon, momentum, outside):
    one = np.float32(1)
    for i in range(parameter.size):
        g = grad[i] * scale
        s = square[i] * decay + (one - decay) * g * g
        square[i] = s
        if mean.size:
            m = mean[i] + (one - decay) * (g - mean[i])
            mean[i] = m
            s -= m * m
        d = within * g / (np.sqrt(s) + epsilon if outside else np.sqrt(s + epsilon))
        if change.size:
            d += momentum * change[i]
            change[i] = d
        parameter[i] -= behind * d


@kernel(nogil=True)
def rmsprop(grad, parameter, copy, square, mean, change, *numbers):
    """Take a step of RMSProp: centered where `mean` is not empty, with momentum where `change` is not."""
    buffer = np.empty(_BLOCK, np.float32)
    for a in range(0, parameter.size, _BLOCK):
        b = min(a + _BLOCK, parameter.size)
        g = _float32(grad[a:b], buffer)
        _rmsprop_block(g, parameter[a:b], square[a:b], mean[a:b], change[a:b], *numbers)
        narrow(parameter[a:b].view(np.uint32), copy[a:b])
