"""What of transformers' continuous batching is stood around, by name: a release that lacks it is refused."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import PlanError

NEEDED = {
    "manager": ("add_request", "add_requests", "stop", "_create_batch_processor", "continuous_batching_config"),
    "processor": ("inputs_and_outputs", "cache", "scheduler", "offloading_manager", "_handle_request_error"),
    "inputs": ("prepare_batch_tensors",),
    "scheduler": ("active_requests", "waiting_requests", "add_waiting_request"),
    "offloading": ("offload_requests",),
    "cache": ("search_prefix_match", "cache_allocators"),
    "allocator": ("match_prefix_blocks", "mark_complete_blocks", "tokens_per_page"),
}
FIRST = "requests_in_batch"
"""First parameter of ``prepare_batch_tensors``."""


def check_processor(processor: Any) -> None:
    """Raise PlanError if a manager's processor, or something in it, is put together in another way."""
    check("processor", processor)
    check("inputs", processor.inputs_and_outputs)
    check("scheduler", processor.scheduler)
    check("offloading", processor.offloading_manager)
    check("cache", processor.cache)
    for allocator in processor.cache.cache_allocators.values():
        check("allocator", allocator)
    if next(iter(inspect.signature(processor.inputs_and_outputs.prepare_batch_tensors).parameters), None) != FIRST:
        raise _other(f"prepare_batch_tensors does not begin with {FIRST}")


def check(kind: str, thing: Any) -> None:
    """Raise PlanError if ``thing`` lacks what is :data:`NEEDED` of its kind."""
    missing = [name for name in NEEDED[kind] if not hasattr(thing, name)]
    if missing:
        raise _other(f"{type(thing).__name__} has no {missing[0]}")


def _other(why: str) -> PlanError:
    return PlanError(
        f"this release of transformers has continuous batching of another make ({why}); steerkern knows that of "
        "5.17 to 5.23"
    )
