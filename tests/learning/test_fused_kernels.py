"""The operations that are one kernel on a GPU: Triton's, in its interpreter, against PyTorch's chains."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pydqn.learning import fused_kernels
from pydqn.learning.fused_kernels import look_up_pixels, td_slopes
from tests.helpers.learners import needs_cuda

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INTERPRETS, reason="needs Triton and TRITON_INTERPRET=1 (scripts/kernels)")


def of_pixels(stack, shape, batch=3):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (50, *shape), generator=generator).to(torch.uint8)
    return frames, torch.randint(0, 50, (batch, stack), generator=generator).int(), 1 / 37.5, -2.25


def of_slopes(actions, dueling, double, batch=5):
    generator = torch.Generator().manual_seed(actions)
    normal = lambda *shape: 3 * torch.randn(shape, generator=generator)  # noqa: E731
    outputs = [
        [normal(size, actions), *([normal(size, 1)] if dueling else [])] for size in (batch * (1 + double), batch)
    ]
    action = torch.randint(0, actions, (batch,), generator=generator)
    return (
        *outputs,
        action,
        normal(batch),
        torch.rand(batch, generator=generator),
        torch.rand(batch, generator=generator),
    )


def test_pixels_are_those_of_the_rows():
    frames, rows, scale, shift = of_pixels(3, (7, 5))
    found = look_up_pixels(frames, rows, scale, shift)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = frames.numpy()[rows.numpy()].astype(np.float32) * np.float32(scale) + np.float32(shift)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_slopes_are_those_of_autograd(dueling, double, loss):
    online, target, action, reward, discount, weight = of_slopes(4, dueling, double)
    leaves = [output.clone().requires_grad_() for output in online]
    combined = [leaves[0] if len(leaves) < 2 else leaves[1] + leaves[0] - leaves[0].mean(1, keepdim=True)]
    combined.append(target[0] if len(target) < 2 else target[1] + target[0] - target[0].mean(1, keepdim=True))
    q, q_t = combined
    best = (q[len(action) :] if double else q_t).argmax(1)
    goal = (reward + discount * q_t.gather(1, best[:, None])[:, 0]).detach()
    error = goal - q[: len(action)].gather(1, action[:, None])[:, 0]
    functions = {"huber": torch.nn.functional.smooth_l1_loss, "mse": torch.nn.functional.mse_loss}
    losses = functions[loss](error, torch.zeros_like(error), reduction="none")
    (weight * losses).mean().backward()
    values, errors, *slopes = td_slopes(online, target, action, reward, discount, weight, loss)
    torch.testing.assert_close(values, q[: len(action)].detach())
    torch.testing.assert_close(errors, error.detach())
    for leaf, slope in zip(leaves, slopes, strict=False):
        torch.testing.assert_close(slope, leaf.grad[: len(action)])


@needs_triton
@pytest.mark.parametrize("stack", [1, 3, 4])
@pytest.mark.parametrize("shape", [(84, 84), (7, 5), (1, 1), (32, 16)])
def test_the_kernel_of_pixels(stack, shape):
    arguments = of_pixels(stack, shape)
    found = fused_kernels.launch_look_up_pixels(*arguments)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.shape == (3, stack, *shape)
    torch.testing.assert_close(found, look_up_pixels(*arguments), rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("actions", [1, 2, 3, 6, 18])
def test_the_kernel_of_slopes(actions):
    for dueling, double, loss in itertools.product((False, True), (False, True), ("huber", "mse")):
        arguments = (*of_slopes(actions, dueling, double), loss)
        found, expected = fused_kernels.launch_td_slopes(*arguments), td_slopes(*arguments)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("double", [False, True])
def test_the_kernel_shows_that_a_network_diverged(double):
    for which in (0, 1):
        arguments = (*of_slopes(4, False, double), "huber")
        arguments[which][0][0] = torch.nan
        errors = fused_kernels.launch_td_slopes(*arguments)[1]
        assert errors[0].isnan()
        assert errors[1:].isfinite().all()


@needs_cuda
def test_the_kernels_on_a_gpu():
    def moved(one):
        return [part.cuda() for part in one] if isinstance(one, list) else one.cuda() if torch.is_tensor(one) else one

    for operator, arguments in (
        (look_up_pixels, of_pixels(4, (84, 84))),
        (td_slopes, (*of_slopes(6, True, True), "huber")),
        (td_slopes, (*of_slopes(3, False, False), "mse")),
    ):
        found, expected = operator(*map(moved, arguments)), operator(*arguments)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability):
    """Without a GPU: ahead of time, for Ampere and for Hopper."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pydqn.learning import triton_kernels as kernels
def compiled(kernel, types, constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", {capability}, 32))
compiled(kernels.look_up_pixels, ["*u8", "*i32", "*fp32", "fp32", "fp32", "i32"], dict(STACK=4, WIDE=4, PIXELS=512))
floats = ["*fp32"] * 4
for dueling in (False, True):
    constants = dict(ACTIONS=6, WIDE=8, DUELING=dueling, DOUBLE=dueling, HUBER=True)
    compiled(kernels.td_slopes, [*floats, "*i64", *["*fp32"] * 7, "i32"], constants)
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
