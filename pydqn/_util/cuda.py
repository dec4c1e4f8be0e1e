"""What crosses between host and device, and functions of fixed tensors that become CUDA graphs."""

from __future__ import annotations

import gc
import os
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
_ALIGNMENT = 64  # bytes; every array of an inbox begins at a multiple


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which work is launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class HostToDevice:
    """Arrays on their way to the device: packed in pinned memory, sent in one copy, unpacked by being views.

    `tensors` stay where they are, so that a graph may read them. On a CPU nothing is copied: `tensors` are the arrays
    that were put last.

    Args:
        examples: arrays with the shapes and dtypes of all that will be put.
        device: where `tensors` are.
        packs: whether to copy; None for wherever there is CUDA.
        names: of the arrays, for messages.
    """

    def __init__(
        self,
        examples: Sequence[NDArray[Any]],
        device: torch.device,
        packs: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._packs = device.type == "cuda" if packs is None else packs
        self._dtypes = [array.dtype for array in examples]
        self._names = [f"array {number}" for number in range(len(examples))] if names is None else names
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        if not self._packs:
            self.tensors = [torch.from_numpy(array) for array in examples]
            return
        starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in examples)]).tolist()
        self._here = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._there = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self._arrays, self.tensors = [], []
        for start, array in zip(starts, examples, strict=False):
            dtype = torch.from_numpy(array[:0]).dtype
            here, there = (
                memory[start : start + array.nbytes].view(dtype).view(array.shape)
                for memory in (self._here, self._there)
            )
            self._arrays.append(here.numpy())
            self.tensors.append(there)

    def put(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Send arrays; the leading axes may be shorter than the examples' (what lies behind is then undefined).

        Waits only until the arrays before have left the pinned memory. Work launched on the current stream from now on
        sees the new ones.

        Raises:
            ValueError: an array has another dtype than its example.
        """
        for name, array, dtype in zip(self._names, arrays, self._dtypes, strict=True):
            if array.dtype != dtype:  # to be converted, values would change
                raise ValueError(f"{name}: expected dtype {dtype}, as of the example, got dtype {array.dtype}")
        if not self._packs:
            self.tensors = [torch.from_numpy(array) for array in arrays]
            return
        if self._sent is not None:
            self._sent.synchronize()
        for here, array in zip(self._arrays, arrays, strict=True):
            here[: len(array)] = array
        self._there.copy_(self._here, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class DeviceToHost:
    """A tensor on its way to the host: the copy is launched by `put`, and only `get` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._memory: Tensor | None = None
        self._here: Tensor | None = None  # what was put last

    def put(self, tensor: Tensor) -> None:
        """Launch the copy, behind what has been launched on the current stream. Only the leading axis may change."""
        if self._arrived is None:
            self._here = tensor
            return
        if self._memory is None or len(self._memory) < len(tensor):
            self._memory = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._here = self._memory[: len(tensor)]
        self._here.copy_(tensor, non_blocking=True)
        self._arrived.record()

    def get(self) -> NDArray[Any]:
        """Return what was put last, once it is here. It is good until the next `put`."""
        assert self._here is not None, "nothing has been put"
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.numpy()


class CannotRecordError(RuntimeError):
    """A function cannot become a CUDA graph; the message says why, in one line."""


_FAILED: list[Any] = []  # graphs whose recording failed: PyTorch's allocator goes on asking them what is theirs


class Graph(Generic[T]):
    """A function of fixed tensors, recorded as a CUDA graph: a call replays it, and gives the same tensors each time.

    Args:
        function: launches kernels on the current stream, never waits for them, branches on no data. Libraries must have
            been used before (`warm_up`), on the same stream.
        stream: to record on; of a CUDA device.
        pool: memory that it may share with graphs which never run at the same time (`torch.cuda.graph_pool_handle`);
            what one gave is overwritten by the next then. None for memory of its own.

    Raises:
        CannotRecordError: the function does what a graph cannot hold. The current stream is what it was before.
        torch.OutOfMemoryError: the device has not enough memory for it; the same of the current stream.
    """

    def __init__(self, function: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(stream.device)
        reason: BaseException | None = None  # why the function stopped; the end of the recording fails then, too
        try:
            # Other threads may do what this one may not, but nothing may be freed meanwhile, not even by accident.
            with (
                _without_collections(),
                torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._result = function()
                except BaseException as error:
                    reason = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(before)
            _FAILED.append(self._graph)
            _free_generator(stream.device)
            reason = reason or error
            if not isinstance(reason, Exception) or isinstance(reason, torch.OutOfMemoryError):
                raise reason from None
            raise CannotRecordError(_told(reason)) from reason

    def __call__(self) -> T:
        self._graph.replay()
        return self._result


def warm_up(function: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Run a function some times before it is recorded. Whatever it changes has changed then, also where this raises.

    Its last run sets PyTorch's synchronization debug mode, which is one for the whole process: another thread that
    waits for the device meanwhile gets a RuntimeError.

    Raises:
        CannotRecordError: the function waits for the device, which only its last run here looks for.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS - 1):
                function()
            stream.synchronize()  # so that the last run is a short one: other threads may not wait meanwhile
            with _waiting_is_an_error():
                try:
                    function()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # it has run without one twice
                    raise CannotRecordError(_told(error)) from error
    finally:
        current.wait_stream(stream)


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put back, when the block ends in whatever way, what is in these tensors now."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Let PyTorch raise where a thread would wait for the device."""
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
def _without_collections() -> Iterator[None]:
    """Let Python collect no garbage in between: tensors and graphs that it would free may belong to other streams."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _free_generator(device: torch.device) -> None:
    """Make the device's random numbers usable again: until a recording has ended well, PyTorch refuses to draw others.

    What stands in the way is a part of the generator's state that a copy does not have.
    """
    with suppress(RuntimeError):
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())


def _told(error: BaseException) -> str:
    """Say in one line what went wrong, and where outside PyTorch."""
    what = (str(error).strip() or type(error).__name__).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(torch.__file__))]
    if not others:
        return what
    return f"{others[-1].filename}:{others[-1].lineno}: {others[-1].line}: {what}"
