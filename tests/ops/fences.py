"""Tensors that end, or begin, where a page does, beside pages that can be neither read nor written."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_memories: list[mmap.mmap] = []


def fenced(value: Tensor, at_end: bool) -> Tensor:
    """A copy of `value` whose end lies at a fence, or else its beginning."""
    page = mmap.PAGESIZE
    room = -(-value.nbytes // page) * page
    _memories.append(mmap.mmap(-1, room + 2 * page))
    memory = torch.frombuffer(_memories[-1], dtype=torch.uint8)
    begin = page + at_end * (room - value.nbytes)
    copy = memory[begin : begin + value.nbytes].view(value.dtype).view(value.shape).copy_(value)
    for fence in (0, page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + fence), page, 0) == 0
    return copy
