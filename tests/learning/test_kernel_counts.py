"""How many kernels an update of each preset launches on a GPU; see `helpers.kernel_counts`.

On a GPU a kernel of a captured update takes two microseconds at least, however little it does, so their number matters.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pydqn import LearnerSettings, preset
from pydqn.envs.make import make_envs
from pydqn.evaluation.build import network_for
from pydqn.learning.fused import reason_against
from pydqn.presets import PRESETS
from tests.helpers.fake_cuda import trace
from tests.helpers.kernel_counts import kernels

# Of an update as PyTorch has it, of the fused form where it fits, and of action values for all environments. They
# should become smaller.
COUNTS = {
    "breakout": (68, 42, 17),
    "breakout-double": (83, 42, 17),
    "breakout-dueling": (83, 36, 17),
    "btr": (835, None, 245),
    "c51": (100, None, 19),
    "cartpole": (42, 28, 8),
    "dopamine-c51": (90, None, 19),
    "dopamine-dqn": (63, 37, 17),
    "dopamine-iqn": (116, None, 23),
    "dopamine-rainbow": (91, None, 19),
    "double": (88, None, 18),
    "dqn": (50, 32, 6),
    "dqn-image": (88, 47, 17),
    "hl-gauss": (83, None, 19),
    "iqn": (116, None, 23),
    "m-dqn": (97, None, 17),
    "m-iqn": (155, None, 23),
    "minatar-dqn": (42, 27, 10),
    "nature": (70, 44, 17),
    "pong": (131, 58, 26),
    "pong-book": (63, 37, 17),
    "prioritized": (88, None, 18),
    "qrdqn": (107, None, 18),
    "rainbow": (299, None, 81),
}


def test_every_preset_has_a_count():
    assert {name for name in PRESETS if preset(name).agent == "dqn"} == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_no_preset_launches_more(name):
    config = preset(name)
    envs = make_envs(config, 1, 0)
    envs.close()
    plain = LearnerSettings.from_config(config)
    fits = not reason_against(network_for(config, envs), plain)
    forms = [plain, dataclasses.replace(plain, update="fused")] if fits else [plain]
    shape, dtype = envs.frame_shape, envs.dtype.name
    traced = [trace(network_for(config, envs), form, shape, dtype, "device", stack=config.stack) for form in forms]
    fused = traced[1].update.kernels if fits else None
    assert (traced[0].update.kernels, fused, traced[0].act.kernels) == COUNTS[name]


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
