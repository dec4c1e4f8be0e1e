from __future__ import annotations

import numpy as np
import pytest
import torch

from pydqn.learning.losses import LOSSES, huber, huber_slope, mse, td_error
from tests.helpers.reference import double_q_update


def random_batch(seed, size=40, actions=5):
    generator = torch.Generator().manual_seed(seed)
    q_tm1, q_t, selector_t = (torch.randn(size, actions, generator=generator) * 2 for _ in range(3))
    a_tm1 = torch.randint(actions, (size,), generator=generator)
    r_t = torch.randn(size, generator=generator)
    discount_t = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) > 0.3)
    return q_tm1, a_tm1, r_t, discount_t, q_t, selector_t


@pytest.mark.parametrize("double", [False, True])
def test_against_the_reference(double):
    q_tm1, a_tm1, r_t, discount_t, q_t, selector_t = random_batch(0)
    ours = huber(td_error(q_tm1, a_tm1, r_t, discount_t, q_t, selector_t if double else None))
    selector = selector_t if double else q_t
    expected = double_q_update(*(x.tolist() for x in (q_tm1, a_tm1, r_t, discount_t, q_t, selector)), 1.0)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_through_the_target():
    q_tm1, a_tm1, r_t, discount_t, q_t, selector_t = (x.clone() for x in random_batch(1))
    for q in (q_tm1, q_t, selector_t):
        q.requires_grad_()
    td_error(q_tm1, a_tm1, r_t, discount_t, q_t, selector_t).sum().backward()
    assert q_t.grad is None
    assert selector_t.grad is None
    np.testing.assert_array_equal(q_tm1.grad.sum(dim=1), -np.ones(40))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_slope_is_the_gradient_of_its_loss(name):
    error = torch.cat([torch.tensor([-3.0, -1.0, -0.2, 0.0, 0.5, 1.0, 7.0]), torch.randn(500) * 2]).requires_grad_()
    LOSSES[name].value(error).sum().backward()
    torch.testing.assert_close(error.grad, LOSSES[name].slope(error.detach()))


def test_huber_is_pytorchs():
    error = torch.linspace(-4, 4, 201)
    torch.testing.assert_close(huber(error), torch.nn.functional.huber_loss(error, 0 * error, reduction="none"))
    torch.testing.assert_close(huber_slope(error), error.clamp(-1, 1))


def test_mse_is_the_square():
    error = torch.tensor([-2.0, 0.5])
    torch.testing.assert_close(mse(error), torch.tensor([4.0, 0.25]))
