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

# Of an update, and of action values for all environments: first as PyTorch has them, and then fused, where that fits.
# They should become smaller.
COUNTS = {
    "breakout": [(68, 17), (42, 7)],
    "breakout-double": [(83, 17), (42, 7)],
    "breakout-dueling": [(83, 17), (36, 10)],
    "btr": [(835, 245)],
    "c51": [(100, 19)],
    "cartpole": [(42, 8), (28, 5)],
    "dopamine-c51": [(90, 19)],
    "dopamine-dqn": [(63, 17), (37, 7)],
    "dopamine-iqn": [(116, 23)],
    "dopamine-rainbow": [(91, 19)],
    "double": [(88, 18)],
    "dqn": [(50, 6), (32, 4)],
    "dqn-image": [(88, 17), (47, 7)],
    "hl-gauss": [(83, 19)],
    "iqn": [(116, 23)],
    "m-dqn": [(97, 17)],
    "m-iqn": [(155, 23)],
    "minatar-dqn": [(42, 10), (27, 7)],
    "nature": [(70, 17), (44, 7)],
    "pong": [(131, 26), (58, 12)],
    "pong-book": [(63, 17), (37, 7)],
    "prioritized": [(88, 18)],
    "qrdqn": [(107, 18)],
    "rainbow": [(299, 81)],
}


def test_every_preset_has_a_count():
    assert {name for name in PRESETS if preset(name).agent == "dqn"} == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_no_preset_launches_more(name):
    if name == "minatar-dqn":
        pytest.importorskip("minatar", reason="needs pip install 'pydqn[minatar]'")
    config = preset(name)
    envs = make_envs(config, 1, 0)
    envs.close()
    plain = LearnerSettings.from_config(config)
    fits = not reason_against(network_for(config, envs), plain)
    forms = [plain, dataclasses.replace(plain, update="fused")] if fits else [plain]
    shape, dtype = envs.frame_shape, envs.dtype.name
    traced = [trace(network_for(config, envs), form, shape, dtype, "device", stack=config.stack) for form in forms]
    assert [(one.update.kernels, one.act.kernels) for one in traced] == COUNTS[name]


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
