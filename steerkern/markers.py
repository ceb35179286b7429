"""Markers: the token sequences by which a text such as ``</think>`` shows up in a model's tokens."""

from __future__ import annotations

import reprlib
from typing import Any

from .errors import PlanError
from .steps import Marker

_BEFORE = ("", " ", "\n", "a", "a.", ".\n")


def marker(tokenizer: Any, text: str) -> Marker:
    """The token sequences that spell ``text``, for ``Tokens(after=...)`` and ``Tokens(until=...)``.

    A text that is one special token has one sequence. Another may be cut differently after a space, a line break or a
    letter; every way that leaves its first token its own is listed. Where the tokenizer merges the end of the text with
    what follows, the sequence is not seen: prefer special tokens.

    Raises:
        PlanError: an empty text, or one that the tokenizer has no tokens for.
    """
    if not isinstance(text, str) or not text:
        raise PlanError(f"a marker needs a text, got {reprlib.repr(text)}")
    sequences: dict[tuple[int, ...], None] = {}
    for before in _BEFORE:
        whole = tuple(tokenizer.encode(before + text, add_special_tokens=False))
        head = tuple(tokenizer.encode(before, add_special_tokens=False)) if before else ()
        tail = whole[len(head) :]
        if tail and whole[: len(head)] == head and tokenizer.decode(list(tail)).strip() == text.strip():
            sequences[tail] = None
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = tuple(s for s in sequences if unknown is None or unknown not in s)
    if not known:
        raise PlanError(f"marker {text!r}: the tokenizer has no tokens that spell it")
    return known
