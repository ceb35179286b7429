"""What the API process asks of the workers, by ``collective_rpc("steerkern", args=(verb, ...))``.

A refusal comes back as a sentence: an exception in a worker would end the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import SteerkernError
from ...plan import Plan
from .worker import Steering


def load(steering: Steering, name: str, source: str, digest: str) -> str:
    """Load a plan from the folder where the API process found it; the reason if that fails, else an empty string."""
    try:
        plan = Plan.from_pretrained(source).named(name)
        if plan.digest != digest:
            return f"plan {name!r} changed while it was loaded"
        steering.load(plan)
    except (SteerkernError, OSError, ValueError, TypeError) as error:
        return str(error)
    return ""


def forget(steering: Steering, digest: str) -> None:
    """Let go of a plan that no request has any more."""
    steering.forget(digest)


def summary(steering: Steering) -> Mapping[str, int]:
    """Counts so far."""
    return steering.summary()


def receipt(steering: Steering, name: str) -> dict[str, Any] | None:
    """What was written of the requests of one receipt."""
    return steering.receipt(name)


def sites(steering: Steering) -> dict[str, Any]:
    """Where this worker steers, by which backend, and why not elsewhere."""
    refused = {str(site): reason for site, reason in steering.anatomy.refused.items()}
    return {"backend": steering.backend, "sites": [str(site) for site in steering.sites], "refused": refused}


VERBS: Mapping[str, Callable[..., Any]] = {
    one.__name__: one for one in (load, forget, summary, receipt, sites)
}  # fmt: skip
