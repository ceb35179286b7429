"""What the gate is to show on a GPU: the bounds, written into its results beside what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """A bound for a median."""

    what: str
    bound: float
    least: bool = False

    def to_json(self) -> dict[str, Any]:
        """Words for it."""
        return {"what": self.what, "goal": f"{'>=' if self.least else '<='} {self.bound}"}

    def judge(self, side: str, found: Sequence[float]) -> dict[str, Any]:
        """Whether the median of the quartiles ``found`` of a side reaches it."""
        met = found[1] >= self.bound if self.least else found[1] <= self.bound
        return {**self.to_json(), "side": side, "found": list(found), "met": bool(met)}


ONE = Goal("time of the op over the unsteered kernel, K=1", 1.05)
SIXTEEN = Goal("time of the op over the unsteered kernel, K=16", 1.3)
PLANS = Goal("time of 256 plans over one", 1.05)
COPY = Goal("bandwidth over that of a copy, K=1, N >= 2048", 0.85, least=True)
DECODING = {
    "eager": Goal("decoding speed over stock, 8B, batch 1, eager", 1.15, least=True),
    "graph": Goal("decoding speed over stock, 8B, batch 1, CUDA graph", 0.99, least=True),
    "compiled": Goal("decoding speed over stock, 8B, batch 1, compiled", 0.99, least=True),
}
GOALS = (*DECODING.values(), ONE, SIXTEEN, PLANS, COPY)


def of_op(n: int, backend: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdicts on what ``ops.measure`` found of ``n`` rows."""
    yield ONE.judge(backend, found["over_unsteered"]["K=1"])
    yield SIXTEEN.judge(backend, found["over_unsteered"]["K=16"])
    if n >= 256:
        yield PLANS.judge(backend, found["plans_over_one"])
    if n >= 2048 and found["of_copy"]:
        yield COPY.judge(backend, found["of_copy"]["K=1"])


def of_decoding(model: str, batch: int, way: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdicts on the speeds over stock that one way of decoding found: ``eager``, ``graph`` or ``compiled``."""
    if (model, batch) != ("8B", 1):
        return
    for side, ratio in found.get("over_stock", {}).items():
        if side.endswith(", steered"):
            yield DECODING[way].judge(side.partition(",")[0], ratio)
