from __future__ import annotations

import numpy as np
import pytest
import torch

from pydqn.learning.pixels import to_channels_last
from pydqn.replay.lookup import as_words, look_up


def definition(images, dtype):
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def layouts(channels):
    """Yield all values in several layouts: apart in memory, overlapping, contiguous, and with strided rows."""
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


def test_results_do_not_share_memory():
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    first, second = (to_channels_last(images, torch.float32) for _ in range(2))
    first += 1
    assert (second == 0).all()
    assert (images == 0).all()


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]


@pytest.mark.parametrize("shape", [(84, 84), (3,), (1,), (2, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_looked_up_bit_for_bit(dtype, shape):
    """Also the bits of NaN; in the widest words that a row consists of."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 256, (20, int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype=np.uint8)
    array = (bits & 1 if dtype == "bool" else bits).view(dtype).reshape(20, *shape)
    frames, rows = torch.from_numpy(array), torch.from_numpy(generator.integers(0, 20, (6, 4), dtype=np.int32))
    found = look_up(frames, rows)
    assert found.dtype == frames.dtype
    assert found.shape == (6, 4, *shape)
    assert found.numpy().tobytes() == array[rows.numpy()].tobytes()
    nbytes = array[0].nbytes
    assert as_words(frames).element_size() == next(size for size in (8, 4, 2, 1) if nbytes % size == 0)
    assert as_words(frames).data_ptr() == frames.data_ptr()
    assert as_words(frames).nbytes == frames.nbytes
    assert look_up(frames, rows[:0]).shape == (0, 4, *shape)


def test_frames_with_any_alignment_are_looked_up():
    memory = torch.arange(1000, dtype=torch.int64).to(torch.uint8)
    rows = torch.tensor([[3, 0], [9, 9]], dtype=torch.int32)
    for start, size in ((1, 8), (2, 8), (4, 8), (8, 8), (3, 5)):
        frames = memory[start : start + 10 * size].view(10, size)
        assert torch.equal(look_up(frames, rows), frames[rows.long()])
    frames = memory.view(10, 10, 10)[:, ::2, ::2]
    assert torch.equal(look_up(frames, rows), frames[rows.long()])
