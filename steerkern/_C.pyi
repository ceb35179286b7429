"""The native extension: addresses and sizes in. Addresses are integers, 0 for none; strides count elements."""

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

class Steer:
    """The kernel for one site: width, dtype (index in ``schemas.DTYPES``), norm and, once bound, the tables."""

    def __init__(self, width: int, dtype: int, norm: int, eps: float) -> None: ...
    def bind(
        self,
        bank: int,
        rows: int,
        links: int,
        fields: int,
        entries: int,
        span: int,
        slots: int,
        gain: int,
        owner: object,
    ) -> None:
        """Read these tables from now on; ``owner`` is kept alive with the kernel."""

    def __call__(
        self,
        n: int,
        h: int,
        h_stride: int,
        slot: int,
        weight: int,
        bias: int,
        y: int,
        threads: int,
        base: int = 0,
        delta: int = 0,
        /,
    ) -> int:
        """Run; -1, or the first row whose slot reaches outside the tables, and then nothing was written.

        With ``base`` and ``delta``, rows with the stride of ``h``, their sum is written to ``h`` first.
        """

    def full(
        self,
        n: int,
        h: int,
        h_stride: int,
        slot: int,
        weight: int,
        bias: int,
        y: int,
        delta: int,
        delta_stride: int,
        trace: int,
        trace_columns: int,
        threads: int,
    ) -> int:
        """The same with ``h += delta`` first and the coordinates written to ``trace``."""

class NormCall:
    """A kernel with what is needed to call it on tensors; see ``bind_norm`` in ops/cpu.py."""

    def __init__(
        self,
        kernel: Steer,
        width: int,
        dtype: torch.dtype,
        parameters: Mapping[str, Tensor | None],
        rows: object,
        threaded: int,
    ) -> None: ...
    @overload
    def __call__(self, state: Tensor, /) -> Tensor | None: ...
    @overload
    def __call__(self, left: Tensor, right: Tensor, /) -> tuple[Tensor, Tensor] | None: ...

class SteerCuda:
    """The same on a CUDA device. Only in builds with CUDA."""

    def __init__(self, width: int, dtype: int, norm: int, eps: float, device: int) -> None: ...
    def bind(
        self,
        bank: int,
        rows: int,
        links: int,
        fields: int,
        entries: int,
        span: int,
        slots: int,
        gain: int,
        owner: object = None,
    ) -> None: ...
    def tune(
        self, *, warps: int = 0, cluster: int = 0, entries: int = 1, dependent: bool = True, gram: bool = False
    ) -> None:
        """How calls are launched; see ``Tuning`` in csrc/cuda/call.h."""

    def prepare(self) -> None:
        """Load the kernels onto the device, or raise BackendError."""

    def __call__(self, n: int, h: int, h_stride: int, slot: int, weight: int, bias: int, y: int, stream: int, /) -> int:
        """Launch and return -1, or raise BackendError."""

    def full(
        self,
        n: int,
        h: int,
        h_stride: int,
        slot: int,
        weight: int,
        bias: int,
        y: int,
        delta: int,
        delta_stride: int,
        trace: int,
        trace_columns: int,
        stream: int,
    ) -> int: ...

def cuda_unusable() -> str: ...
def cuda_archs() -> str: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
