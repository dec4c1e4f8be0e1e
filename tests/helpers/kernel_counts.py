"""How many CUDA kernels an operation of PyTorch launches: counted from its arguments, without a GPU.

The rules are those of PyTorch 2.11's sources: one kernel per operation that computes, none for views, and several where
the functions below say so. What a library does inside is not seen: cuBLAS may split a matrix product in two, and cuDNN
may change layouts around a convolution. Fills and copies within the device count, although they are nodes of their own
kind in a graph.
"""

from __future__ import annotations

import torch

# Of `multi_tensor_apply`: a launch takes so many blocks of so many elements, of so many tensors per list.
_CHUNK, _BLOCKS = 65_536, 320
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists
_NONE = {"aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty"}


def kernels(function, args, kwargs, result):
    """Return the number of kernels of one dispatched operation, `torch._ops.OpOverload`."""
    name = str(function.overloadpacket)
    if function.is_view or name in _NONE or name.startswith("profiler."):
        return 0
    if name == "aten.convolution":
        return 1 + (args[2] is not None)  # the bias is added afterwards
    if name == "aten.convolution_backward":
        return sum(args[-1])  # gradients of the input, the weights and the bias
    if name == "aten._foreach_norm":
        return _launches(args[0], 1) + 2  # zeros before, and the sum over blocks after
    if name.startswith(("aten._foreach_", "aten._fused_")):
        lists = sum(_is_tensors(arg) for arg in (*args, result))
        # A fused optimizer's kernel finds the parameters' numbers of steps elsewhere; `_foreach_..._` returns nothing.
        return _launches(args[0], lists - name.startswith("aten._fused_"))
    return 1


def _is_tensors(arg):
    return isinstance(arg, (list, tuple)) and len(arg) > 0 and all(isinstance(one, torch.Tensor) for one in arg)


def _launches(tensors, depth):
    """Return how often `multi_tensor_apply` launches its kernel for lists of such tensors."""
    launches = blocks = held = 0
    tensors = [tensor for tensor in tensors if tensor.numel()]
    for index, tensor in enumerate(tensors):
        held += 1
        chunks = -(-tensor.numel() // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if (held == _TENSORS[depth] and is_last) or blocks == _BLOCKS or (is_last and index == len(tensors) - 1):
                launches += 1
                blocks, held = 0, 0 if is_last else 1
    return launches
