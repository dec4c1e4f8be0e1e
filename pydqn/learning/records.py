"""Networks' part in records: frames of several parts, or with an action mask (see `FrameLayout`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pydqn.envs.frames import FrameLayout

MASKED = torch.finfo(torch.float32).min  # the value of an action that is not allowed; finite, so that 0 times it is 0


def parts_of(obs: Tensor, layout: FrameLayout) -> list[Tensor]:
    """Take (B, stack, bytes) records apart: one (B, stack, *shape) tensor per part, in its own dtype."""
    parts, start = [], 0
    for part in layout.parts:
        values = obs[..., start : start + part.nbytes]
        if part.dtype != np.uint8:  # from the start of memory of their own: bytes may begin anywhere, numbers may not
            values = values.clone(memory_format=torch.contiguous_format).view(torch.float32)
        parts.append(values.unflatten(-1, part.shape) if part.shape else values.squeeze(-1))
        start += part.nbytes
    return parts


class RecordTorso(nn.Module):
    """A torso per part of a record: (B, stack, bytes) uint8 to (B, features), those of all parts."""

    def __init__(self, layout: FrameLayout, torsos: Sequence[nn.Module], features: int) -> None:
        super().__init__()
        self._layout = layout
        self.torsos = nn.ModuleList(torsos)
        self.features = features
        self.splits = False

    def prepare(self, obs: Tensor) -> Tensor:
        """Return `obs`: records stay bytes until `forward` takes them apart."""
        return obs

    def forward(self, obs: Tensor) -> Tensor:
        """Return the features of `obs`."""
        return self.of_parts(parts_of(obs, self._layout))

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the features of records that have been taken apart."""
        return torch.cat([torso(part) for torso, part in zip(self.torsos, parts, strict=True)], dim=1)


class ActionMask(nn.Module):
    """Gives actions that the newest frame's mask does not allow the value `MASKED`.

    So they are never the best: neither when acting, nor in the target's maximum, nor in double Q-learning's choice.
    """

    powers: Tensor

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self._num_actions = num_actions
        powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
        self.register_buffer("powers", powers, persistent=False)

    def allowed(self, obs: Tensor) -> Tensor:
        """Return (B, A) booleans: which actions the newest frames of (B, stack, bytes) records allow."""
        packed = obs[:, -1, obs.shape[-1] - -(-self._num_actions // 8) :]
        return (packed.unsqueeze(-1) & self.powers).flatten(1)[:, : self._num_actions] != 0

    def forward(self, values: Tensor, obs: Tensor) -> Tensor:
        """Return (B, A) values of (B, stack, bytes) records, masked."""
        return values.masked_fill(~self.allowed(obs), MASKED)
