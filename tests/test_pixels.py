from __future__ import annotations

import pytest
import torch

from pydqn.pixels import to_channels_last


def definition(images, dtype):
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def layouts(channels):
    """All values in all places: apart in memory, overlapping, whole, and with rows that are not contiguous."""
    images = torch.randint(0, 256, (5, 12, 9, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    yield images[:, :channels]
    yield images[:, 1 : channels + 1]
    yield images[:, :channels].contiguous()
    yield images[:1, :channels]
    yield images[:0, :channels]
    yield images[:, :channels].transpose(2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_against_the_definition(channels, dtype):
    for images in layouts(channels):
        ours = to_channels_last(images, dtype)
        assert torch.equal(ours, definition(images, dtype))
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_result_is_memory_of_its_own():
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    first, second = (to_channels_last(images, torch.float32) for _ in range(2))
    first += 1
    assert (second == 0).all()
    assert (images == 0).all()
