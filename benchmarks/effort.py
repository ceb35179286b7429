"""How long to measure: the full run, or with ``STEERKERN_BENCH_QUICK=1`` (``steerkern bench --quick``) a short look."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

SHARE, LEAST = 8, 3
"""A short look takes one round in so many, and at least so many."""


def quick() -> bool:
    """Whether this is a short look."""
    return os.environ.get("STEERKERN_BENCH_QUICK") == "1"


def rounds(full: int) -> int:
    """Rounds to measure where the full run has ``full``."""
    return max(LEAST, full // SHARE) if quick() else full


def warmup() -> int:
    """Rounds that are run first and not counted."""
    return 1 if quick() else 2


def seconds(full: float) -> float:
    """Seconds to measure where the full run takes ``full``."""
    return full / SHARE if quick() else full


def rounds_within(full: float, run: Callable[[], Any], contenders: int, least: int = 7, most: int = 25) -> int:
    """Rounds of ``contenders`` runs each that take about ``full`` seconds, judged by one ``run`` after a first one."""
    run()
    start = time.perf_counter()
    run()
    each = contenders * (time.perf_counter() - start)
    return min(max(int(seconds(full) / each), LEAST if quick() else least), rounds(most))
