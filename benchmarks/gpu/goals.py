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

    def judge(self, side: str, found: Sequence[float] | None) -> dict[str, Any]:
        """Whether the median of the quartiles ``found`` of a side reaches it; None: it was wrong or failed."""
        met = found is not None and (found[1] >= self.bound if self.least else found[1] <= self.bound)
        return {**self.to_json(), "side": side, "found": found, "met": met}


ONE = Goal("op over the unsteered kernel, K=1", 1.05)
SIXTEEN = Goal("op over the unsteered kernel, K=16", 1.3)
PLANS = Goal("256 plans over one", 1.05)
COPY = Goal("bandwidth over that of a copy, K=1, N >= 2048", 0.85, least=True)
DECODING = {
    "eager": Goal("decoding speed over stock, 8B, batch 1, eager", 1.15, least=True),
    "graph": Goal("decoding speed over stock, 8B, batch 1, CUDA graph", 0.99, least=True),
    "compiled": Goal("decoding speed over stock, 8B, batch 1, compiled", 0.99, least=True),
}
GOALS = (*DECODING.values(), ONE, SIXTEEN, PLANS, COPY)


def of_op(n: int, backend: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdicts on what ``ops.measure`` found of ``n`` rows."""
    over, of_copy = found.get("over_unsteered", {}), found.get("of_copy", {})
    yield ONE.judge(backend, over.get("K=1"))
    yield SIXTEEN.judge(backend, over.get("K=16"))
    if n >= 256:
        yield PLANS.judge(backend, found.get("plans_over_one"))
    if n >= 2048:
        yield COPY.judge(backend, of_copy.get("K=1"))


def of_decoding(model: str, batch: int, way: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdicts on the speeds over stock that one way of decoding found: ``eager``, ``graph`` or ``compiled``."""
    if (model, batch) != ("8B", 1):
        return
    for part in ("over_stock", "wrong", "failed"):
        for side, ratio in found.get(part, {}).items():
            if side.endswith(", steered"):
                yield DECODING[way].judge(side.partition(",")[0], ratio if part == "over_stock" else None)
