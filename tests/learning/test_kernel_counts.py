"""How many kernels an update of each preset launches on a GPU; see `helpers.kernel_counts`.

On a GPU a kernel of a captured update takes two microseconds at least, however little it does, so their number matters.
"""

from __future__ import annotations

import pytest
import torch

from pydqn import LearnerSettings, preset
from pydqn.envs.make import make_envs
from pydqn.evaluation.build import network_for
from pydqn.presets import PRESETS
from tests.helpers.fake_cuda import trace
from tests.helpers.kernel_counts import kernels

# Of an update, and of action values for all environments. Change them when they change: they should become smaller.
COUNTS = {
    "breakout": (73, 17),
    "breakout-double": (88, 17),
    "breakout-dueling": (88, 17),
    "btr": (835, 245),
    "c51": (100, 19),
    "cartpole": (47, 8),
    "dopamine-c51": (95, 19),
    "dopamine-dqn": (68, 17),
    "dopamine-iqn": (121, 23),
    "dopamine-rainbow": (96, 19),
    "double": (93, 18),
    "dqn": (50, 6),
    "dqn-image": (88, 17),
    "hl-gauss": (88, 19),
    "iqn": (121, 23),
    "m-dqn": (102, 17),
    "m-iqn": (160, 23),
    "minatar-dqn": (47, 10),
    "nature": (75, 17),
    "pong": (131, 26),
    "pong-book": (68, 17),
    "prioritized": (93, 18),
    "qrdqn": (107, 18),
    "rainbow": (299, 81),
}


def test_every_preset_has_a_count():
    assert {name for name in PRESETS if preset(name).agent == "dqn"} == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_no_preset_launches_more(name):
    config = preset(name)
    envs = make_envs(config, 1, 0)
    try:
        settings, dtype = LearnerSettings.from_config(config), envs.dtype.name
        traced = trace(network_for(config, envs), settings, envs.frame_shape, dtype, "device", stack=config.stack)
    finally:
        envs.close()
    assert (traced.update.kernels, traced.act.kernels) == COUNTS[name]


def counted(packet, *args, result=None, **kwargs):
    return kernels(packet, args, kwargs, result)


def test_the_rules():
    aten, one = torch.ops.aten, torch.empty(3, 4, device="meta")
    assert counted(aten.t.default, one, result=one) == counted(aten._unsafe_view.default, one, [12], result=one) == 0
    assert counted(aten.relu.default, one, result=one) == counted(aten.cat.default, [one, one], result=one) == 1
    assert [counted(aten.convolution.default, one, one, bias, result=one) for bias in (None, one)] == [1, 2]
    assert counted(aten.convolution_backward.default, one, one, one, None, [False, True, True], result=[one] * 3) == 2
    many = [torch.empty(1, device="meta")] * 100
    assert [counted(aten._foreach_add_.Scalar, many[:n], 1.0) for n in (1, 100)] == [1, 1]
    assert counted(aten._foreach_add.Scalar, many, 1.0, result=many) == 2  # 64 tensors each
    assert counted(aten._foreach_mul_.List, many, many) == 2
    large = [torch.empty(321 * 65_536, device="meta")]  # a launch has 320 blocks
    assert counted(aten._foreach_add_.Scalar, large, 1.0) == 2
    assert counted(aten._foreach_norm.Scalar, many, result=many) == 3
    parts = [many, many, many, many, [], many]
    assert counted(aten._fused_adam_.default, *parts, lr=1e-3) == 3  # 36 tensors each
