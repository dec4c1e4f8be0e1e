"""Copies between host and device, and CUDA graphs of functions of fixed tensors."""

from __future__ import annotations

import gc
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

_WARMUPS = 3  # before a capture, so that libraries choose their kernels
_ALIGNMENT = 64  # bytes; every array in a host-to-device buffer starts at a multiple


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which work is launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class HostToDevice:
    """A buffer that sends several arrays to the device in one copy, from pinned memory.

    `tensors` are views of the buffer on the device. They stay where they are, so that a graph may read them. On a CPU
    nothing is copied: `tensors` share the memory of the arrays that were put last.

    Args:
        examples: arrays with the largest shapes, and the dtypes, of the arrays that will be put.
        device: the device of `tensors`.
        packed: whether to copy; None to copy to CUDA devices only.
        names: names of the arrays, for error messages.
    """

    def __init__(
        self,
        examples: Sequence[NDArray[Any]],
        device: torch.device,
        packed: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._packed = device.type == "cuda" if packed is None else packed
        self._dtypes = [array.dtype for array in examples]
        self._names = [f"array {number}" for number in range(len(examples))] if names is None else names
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        if not self._packed:
            self.tensors = [torch.from_numpy(array) for array in examples]
            return
        starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in examples)]).tolist()
        self._host = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self._arrays, self.tensors = [], []
        for start, array in zip(starts, examples, strict=False):
            dtype = torch.from_numpy(array[:0]).dtype
            host, tensor = (
                buffer[start : start + array.nbytes].view(dtype).view(array.shape)
                for buffer in (self._host, self._device)
            )
            self._arrays.append(host.numpy())
            self.tensors.append(tensor)

    def put(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Send arrays. Their first axes may be shorter than those of the examples; the rest is then undefined.

        Waits only until the previous arrays have left the pinned memory. Work that is launched on the current stream
        from now on sees the new ones.

        Raises:
            ValueError: an array has another dtype than its example.
        """
        for name, array, dtype in zip(self._names, arrays, self._dtypes, strict=True):
            if array.dtype != dtype:  # a conversion would change values
                raise ValueError(f"{name}: expected dtype {dtype}, as of the example, got dtype {array.dtype}")
        if not self._packed:
            self.tensors = [torch.from_numpy(array) for array in arrays]
            return
        if self._sent is not None:
            self._sent.synchronize()
        for host, array in zip(self._arrays, arrays, strict=True):
            host[: len(array)] = array
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class DeviceToHost:
    """A buffer that brings a tensor to the host: `put` launches the copy, and only `get` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._pinned: Tensor | None = None
        self._latest: Tensor | None = None

    def put(self, tensor: Tensor) -> None:
        """Launch the copy on the current stream. Only the first axis may differ between calls."""
        if self._arrived is None:
            self._latest = tensor
            return
        if self._pinned is None or len(self._pinned) < len(tensor):
            self._pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._latest = self._pinned[: len(tensor)]
        self._latest.copy_(tensor, non_blocking=True)
        self._arrived.record()

    def get(self) -> NDArray[Any]:
        """Wait for the tensor that was put last and return it. The next `put` overwrites it."""
        assert self._latest is not None, "nothing has been put"
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._latest.numpy()


class CaptureError(RuntimeError):
    """A function cannot be captured in a CUDA graph; the message says why, in one line."""


_failed_graphs: list[Any] = []  # kept alive, because PyTorch's allocator goes on asking them what is theirs


class Graph(Generic[T]):
    """A function of fixed tensors, captured in a CUDA graph. A call replays it and returns the same tensors each time.

    Args:
        function: launches kernels on the current stream, never waits for them, and does not branch on data. Libraries
            must have been used before on the same stream (`warm_up`).
        stream: the stream to capture on, of a CUDA device.
        pool: a memory pool shared with graphs that never run at the same time (`torch.cuda.graph_pool_handle`); these
            overwrite each other's results. None for memory of its own.
        generator: the random generator that the function draws from, if that is not the device's own. Each replay draws
            new numbers.

    Raises:
        CaptureError: the function does what a graph cannot hold. The current stream is as it was before.
        torch.OutOfMemoryError: the device has too little memory. The current stream is as it was before.
    """

    def __init__(
        self,
        function: Callable[[], T],
        stream: torch.cuda.Stream,
        pool: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        before = torch.cuda.current_stream(stream.device)
        reason: BaseException | None = None  # why the function stopped; then the end of the capture fails, too
        try:
            # Other threads may use the device, but nothing may be freed meanwhile, not even by the garbage collector.
            with (
                _garbage_collection_paused(),
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = function()
                except BaseException as error:
                    reason = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(before)
            _failed_graphs.append(self._graph)
            with suppress(Exception):  # releases of PyTorch before 2026 do not, and refuse the next capture
                torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            _release_generators(stream.device, generator)
            reason = reason or error
            if not isinstance(reason, Exception) or isinstance(reason, torch.OutOfMemoryError):
                raise reason from None
            raise CaptureError(_summary(reason)) from reason

    def __call__(self) -> T:
        self._graph.replay()
        return self._result


def warm_up(function: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Run a function several times before its capture. Its side effects stay, even when this raises.

    The last run sets PyTorch's synchronization debug mode, which applies to the whole process: any other thread that
    waits for the device meanwhile gets a RuntimeError.

    Raises:
        CaptureError: the function waits for the device.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS - 1):
                function()
            stream.synchronize()  # keeps the last run short, during which other threads may not wait
            with _synchronization_raises():
                try:
                    function()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # the runs before did not raise it
                    raise CaptureError(_summary(error)) from error
    finally:
        current.wait_stream(stream)


def seconds_of(function: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the seconds that a call takes on the device, on average of `count` calls in a row (waits for it)."""
    function()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - started) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / count


@contextmanager
def preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of these tensors at the end of the block, also after an exception."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


@contextmanager
def tensor_float_32(*, products: bool, convolutions: bool) -> Iterator[None]:
    """Let matrix products, or convolutions, of float32 round to TensorFloat-32 on a GPU within the block, or not.

    PyTorch's defaults are False and True. The settings hold for the whole process; a graph keeps those of its capture.
    Within the block PyTorch's older settings (`allow_tf32`, `get_float32_matmul_precision`) cannot be read.
    """
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn))
    # Before PyTorch 2.9 they are booleans.
    new = hasattr(backends[0], "fp32_precision")
    name, values = ("fp32_precision", ("ieee", "tf32")) if new else ("allow_tf32", (False, True))
    before = [getattr(backend, name) for backend in backends]
    try:
        for backend, allowed in zip(backends, (products, convolutions), strict=True):
            setattr(backend, name, values[allowed])
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, name, value)


@contextmanager
def _synchronization_raises() -> Iterator[None]:
    """Make PyTorch raise an error wherever a thread would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector: it might free tensors and graphs of other streams."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _release_generators(device: torch.device, other: torch.Generator | None) -> None:
    """Make random number generators usable after a failed capture, until whose end PyTorch refuses to draw.

    A copy of a generator's state lacks the mark that a capture is going on.
    """
    for generator in (torch.cuda.default_generators[device.index], other):
        if generator is not None:
            with suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())


def _summary(error: BaseException) -> str:
    """Say in one line what went wrong, and where outside PyTorch."""
    what = (str(error).strip() or type(error).__name__).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(torch.__file__))]
    if not others:
        return what
    return f"{others[-1].filename}:{others[-1].lineno}: {others[-1].line}: {what}"
