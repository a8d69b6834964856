"""What a GPU keeps for the backward pass where a CPU keeps something else.

Attention keeps no matrix of all pairs, the mask of a dropout has one byte per element, and autocast
runs a few functions in float32 (the list is in the documentation of `torch.amp`).
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F

_HALF = (torch.bfloat16, torch.float16)


def as_on_gpu():
    """Let torch's functions keep, on tensors of the CPU, what they keep on a GPU.

    Returns
    -------
    contextlib.AbstractContextManager
        For tensors without content only: a CPU has no such kernels.
    """
    kept_in_float32 = ("layer_norm", "group_norm", "interpolate")
    rules = {name: _in_float32(getattr(F, name)) for name in kept_in_float32}
    return mock.patch.multiple(
        F, dropout=_gpu_dropout, scaled_dot_product_attention=_gpu_attention, **rules
    )


def _in_float32(function):
    """Wrap a function that autocast runs in float32 on a GPU, but not on a CPU."""

    def wrapped(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [_widened(one) for one in args]
            kwargs = {name: _widened(one) for name, one in kwargs.items()}
        return function(*args, **kwargs)

    return wrapped


def _widened(value):
    """Return a tensor of half precision in float32, anything else as it is."""
    half = isinstance(value, torch.Tensor) and value.dtype in _HALF
    return value.float() if half else value


def _gpu_dropout(input, p=0.5, training=True, inplace=False):
    """Drop as a GPU does, whose mask is boolean."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Attend by the kernel a GPU would choose: flash, or memory-efficient with a mask or float32."""
    if attn_mask is None and query.dtype != torch.float32:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        return attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
