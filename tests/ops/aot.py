"""What tests/test_kernels_aot.py compiles without a GPU: the list `COMPILED` of each tests/ops/test_<op>.py."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One kernel with its constants, and what its instructions must hold."""

    kernel: str  # <op>_kernel or <op>_<part>_kernel
    constants: dict[str, Any]
    warps: int
    loads: int = 0  # 16-byte loads that must be there, cp.async among them
    stores: int = 0
    types: dict[str, str] = {}  # noqa: RUF012
    aligned: bool = True
    options: dict[str, str] = {}  # noqa: RUF012 (constants of its module)
