from __future__ import annotations

import math
import os
import subprocess
import sys
import types

import pytest
import torch

from pydqn._util import machine
from pydqn.learning import policy
from pydqn.runs.provenance import provenance


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_provenance_names_the_machine():
    about = provenance()
    assert about["processor"]
    assert about["cores"].split()[0] == str(machine.usable_cores())
    assert about["instruction_sets"] == " ".join(machine.instruction_sets())


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu fma avx2 sse\n", ("AMD EPYC", ("avx2", "fma"))),
        ("model name\t: X  Y\nflags\t: avx512f amx_bf16 avx512_bf16\n\nmodel name\t: Z\n",
         ("X Y", ("avx512f", "avx512_bf16", "amx_bf16"))),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", (None, ("asimd", "bf16"))),
        ("", (None, ())),
    ],
)  # fmt: skip
def test_processors_are_read_from_the_system(monkeypatch, tmp_path, info, expected):
    path = tmp_path / "cpuinfo"
    path.write_text(info)
    monkeypatch.setattr(machine, "Path", lambda _: path)
    model, sets = expected
    assert machine.instruction_sets() == sets
    assert machine.processor() == model if model else machine.processor()


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # A parent group has the lower limit.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2,
        ),
        # Version 1: a container sees its own group as the root.
        (
            {
                "proc/self/cgroup": "5:memory:/docker/x\n2:cpuacct,cpu:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, math.inf),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": "1 1"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, math.inf),
    ],
)
def test_the_quota_of_a_container_counts(monkeypatch, tmp_path, files, quota):
    root = write(tmp_path, files)
    assert machine.cpu_quota(root) == quota
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert machine.usable_cores() == min(64, max(1, math.floor(quota) if quota < math.inf else 64))


def test_only_cores_that_the_process_is_bound_to_count():
    program = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from pydqn._util import machine; print(machine.usable_cores())"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "1"


@pytest.mark.parametrize(
    ("there", "dtype"),
    [
        ({"avx2"}, torch.float32),
        ({"avx2", "avx512_f", "avx512_vnni"}, torch.float32),
        ({"avx2", "avx512_f", "avx512_bf16"}, torch.bfloat16),
        ({"avx2", "amx_bf16"}, torch.bfloat16),
        ({"bf16"}, torch.float32),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_precision_follows_from_the_processor(monkeypatch, there, dtype, old):
    if old:  # a PyTorch without get_capabilities
        monkeypatch.setattr(torch, "cpu", types.SimpleNamespace())
        monkeypatch.setattr(policy, "instruction_sets", lambda: tuple(there))
    else:
        capabilities = {**dict.fromkeys(("avx512_bf16", "amx_bf16", "avx2"), False), **dict.fromkeys(there, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert policy.resolve_precision("auto", torch.device("cpu")) == dtype
