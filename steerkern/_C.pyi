"""The native extension: addresses and sizes in. Addresses are integers, 0 for none; strides count elements."""

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
        self, n: int, h: int, h_stride: int, slot: int, weight: int, bias: int, y: int, threads: int, /
    ) -> int:
        """Run; -1, or the first row whose slot reaches outside the tables, and then nothing was written."""

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

def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
