"""Blocks of the prefix cache are shared where the steering that touched them is the same, and nowhere else.

vLLM names a block by the hash of its tokens, of the block before it and of *extra keys*. From the first block on that
holds a token which a plan may write, the digest of the plans is such a key; from where the steering depends on how long
the prompt is, the length too, as the reply to one prompt may be part of the next. Blocks before that have plain names:
a plan that writes generated tokens only shares the cached prompt of requests without it.
"""

from __future__ import annotations

from typing import Any

from .asked import Ticket, ticket_of

Key = tuple[str, str]


def extra_keys(ticket: Ticket | None, end: int) -> list[Key]:
    """The keys of a block whose last token is number ``end - 1``."""
    if ticket is None or end <= ticket.first:
        return []
    length = f" {ticket.prompt}" if end > ticket.by_length else ""
    return [("steerkern", f"{ticket.key}{length}")]


def keys_of(request: Any, end: int) -> list[Key]:
    """The same for a request of the scheduler, which keeps its ticket once read."""
    held = request.__dict__.get("_steerkern", _UNREAD)
    if held is _UNREAD:
        held = request.__dict__["_steerkern"] = ticket_of(request.sampling_params)
    return extra_keys(held, end)


_UNREAD: Any = object()


def salt(given: str | None, ticket: Ticket) -> str:
    """The ``cache_salt`` of a steered request: caches outside the engine know blocks by it, not by extra keys."""
    return f"{given or ''} {ticket.key} {ticket.prompt}"
