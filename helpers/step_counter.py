"""Bytes alive and operations done while torch runs, real or without content."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class StepCounter(TorchDispatchMode):
    """Count the bytes of all storages that are alive, and floating-point operations.

    `torch.distributed._tools.MemTracker` hooks every parameter and refuses frozen ones;
    `torch.utils.flop_counter.FlopCounterMode` keeps what checkpointing would free. So only the
    formulas of the latter are used.

    Parameters
    ----------
    block_bytes : int
        Each storage is rounded up to a multiple.

    Attributes
    ----------
    now_bytes, peak_bytes : int
        Alive, and the most there were.
    flops : int
        Of matrix products, attention and convolutions.
    """

    def __init__(self, block_bytes=1):
        super().__init__()
        self.now_bytes = self.peak_bytes = self.flops = 0
        self._block_bytes, self._sizes = block_bytes, {}

    def add(self, tensors):
        """Count the storages of tensors, each once.

        Parameters
        ----------
        tensors : iterable of torch.Tensor
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
                self.now_bytes += self._sizes[key]
                weakref.finalize(storage, self._drop, key)
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _drop(self, key):
        """Forget a storage that is freed."""
        self.now_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count what it made and did."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.add(one for one in tree_iter(result) if isinstance(one, torch.Tensor))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result
