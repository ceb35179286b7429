"""Where requests begin: calls of the decoder and of ``generate``, read for batch, positions and padding."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanError
from . import compiled
from .batch import Batch
from .deciding import Deciding
from .events import NO_TOKEN
from .prompts import Ints, Prompts
from .rows import Part, RowMap


class DecoderCalls:
    """Sets the row map before each forward of a decoder.

    Inside ``generate`` (or :meth:`open`) the prompts are known. Outside, a forward without cached tokens starts a
    request and all its tokens are the prompt; one after cached tokens continues the request of that cache. A serving
    loop says with :meth:`expect` what its next forward holds.
    """

    def __init__(self, decoder: nn.Module, rows: RowMap, deciding: Deciding, edits_input: bool) -> None:
        self.rows = rows
        self.deciding = deciding
        self.edits_input = edits_input
        """Whether the first block's input, which may be the caller's ``inputs_embeds``, is edited."""
        self.compiled = False
        """Whether a compiled graph has asked for its row map."""
        self._names = [name for name in inspect.signature(type(decoder).forward).parameters if name != "self"]
        self.running: dict[int, Batch] = {}
        """Requests that were opened and not yet closed, by number."""
        self._thread = threading.local()
        self._by_cache: weakref.WeakKeyDictionary[Any, Batch] = weakref.WeakKeyDictionary()
        self._loose: Batch | None = None  # of forwards without a cache
        self._ended: list[Batch] = []
        self._parts: list[Part] = []
        self._setter = compiled.register(self)

    # requests

    def open(self, prompts: Prompts, plans: list[tuple[str, ...]] | None = None) -> Batch:
        """Start a request of this thread whose prompts are known, with plans of its own or those of its rows.

        Raises:
            PlanError: plans, or assigned rows, for another number of prompts; a plan that is not there.
        """
        with self.rows.lock:
            for name in {name for names in plans or () for name in names}:
                self.rows.program.get(name)
            batch = self._begin(prompts, plans)
            self._thread.batch = self.running[batch.number] = batch
        return batch

    def close(self) -> None:
        """End it."""
        batch = getattr(self._thread, "batch", None)
        self._thread.batch = self._thread.history = None
        if batch is not None:
            self.end(batch)

    def end(self, batch: Batch) -> None:
        """Forget a batch before the next forward: it ran for the last time."""
        self.running.pop(batch.number, None)
        self._ended.append(batch)

    def assign(self, plans: Sequence[tuple[str, ...]] | None) -> None:
        """Give the requests that are running other plans, where they are as many as the plans name."""
        loose = [] if self._loose is None else [self._loose]
        for batch in [*self.running.values(), *self._by_cache.values(), *loose]:
            if not batch.label and (plans is None or len(plans) == len(batch.prompts)):
                batch.assign(plans)

    def expect(self, parts: Sequence[Part]) -> None:
        """Say what the next forward of this thread holds; its rows are those of the parts, one after the other."""
        self._thread.expected = list(parts)

    def remember(self, ids: Tensor) -> None:
        """Keep the tokens ``[B, S]`` of the whole sequences, as ``generate`` has them before a forward."""
        self._thread.history = ids

    @property
    def prompts(self) -> Prompts | None:
        """The prompts of this thread's request, or of the last forward without one."""
        batch = getattr(self._thread, "batch", None) or self._loose
        return None if batch is None else batch.prompts

    def _begin(self, prompts: Prompts, plans: list[tuple[str, ...]] | None = None) -> Batch:
        with self.rows.lock:
            if plans is None:
                batch = Batch(self.rows.program, prompts, self.rows.assigned)
            else:
                batch = Batch(self.rows.program, prompts, plans, f"a request of {len(plans)} rows")
            self.rows.begin()
        return batch

    # forwards

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the row map from the arguments of this forward."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        embeds = named.get("inputs_embeds")
        state = embeds if embeds is not None else named.get("input_ids")
        if state is None:
            return  # the decoder says so better
        if embeds is not None and self.edits_input:
            if "inputs_embeds" not in kwargs:
                raise PlanError("inputs_embeds must be passed by name while layer 0 is steered")
            kwargs["inputs_embeds"] = embeds.clone()
        batch, tokens = state.size(0), state.size(1)
        kept = named.get("logits_to_keep")
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        cache = named.get("past_key_values")
        if cache is None:
            cache = named.get("cache_params")
        if torch.compiler.is_compiling():
            past = 0 if cache is None else cache.get_seq_length()
            self.rows.count = batch * tokens
            self.rows.kept = kept if type(kept) is int else 0
            ids = named.get("input_ids")
            compiled.set_rows(self.rows.slot, mask, past, ids, batch, tokens, self._setter)
            return
        self.rows.lock.acquire()
        try:
            self.rows.kept = kept if type(kept) is int else 0
            parts = self._take_expected(batch * tokens)
            if parts is None:
                if "cu_seq_lens_q" in named:
                    raise PlanError("this manager of continuous batching was made before the session: make it again")
                parts = [self._part(batch, tokens, self._past(cache), mask, cache, named.get("input_ids"))]
            self._advance(parts, named)
        except BaseException:
            self.deciding.abandon()
            self.rows.finish()
            self.rows.lock.release()
            raise
        self._thread.inside = True

    def after(self, output: Any) -> None:
        """Leave the forward; ``output`` is None if it raised."""
        if torch.compiler.is_compiling() or not getattr(self._thread, "inside", False):
            return
        self._thread.inside = False
        try:
            if output is None:
                self.deciding.abandon()
            else:
                self.deciding.after(self._parts)
        finally:
            self.rows.finish()
            self.rows.lock.release()

    def set_rows(self, batch: int, tokens: int, past: int, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        """The slots of a forward that runs as a compiled graph, which holds the address of the row map."""
        rows = self.rows
        with rows.lock:
            if batch * tokens > rows.slot.numel():
                raise PlanError(
                    f"a compiled forward of {batch * tokens} rows, the row map holds {rows.slot.numel()}; "
                    "run one such forward eagerly first, then compile"
                )
            self.compiled = True
            parts = self._take_expected(batch * tokens) or [self._part(batch, tokens, past, mask, None, ids)]
            undecided = [step for part in parts if not part.batch.decided for step in part.batch.steps()]
            if any(step.decisions for step in undecided):
                raise PlanError("a plan decides from the prompt in eager forwards only; this one is compiled")
            if any(part.batch.each_token for part in parts):  # the graph has no place where its states are shown
                raise PlanError("a controller is asked at every token in eager forwards only; this one is compiled")
            self._advance(parts, {})
            rows.finish()
            return rows.slot[: batch * tokens]

    def _advance(self, parts: list[Part], inputs: dict[str, Any]) -> None:
        while self._ended:
            self.deciding.drop(self._ended.pop())
        self._parts = parts
        self.deciding.before(parts, inputs)
        self.rows.advance(parts)

    def _take_expected(self, count: int) -> list[Part] | None:
        parts: list[Part] | None = getattr(self._thread, "expected", None)
        self._thread.expected = None
        if parts is None:
            return None
        told = sum(part.rows * part.tokens for part in parts)
        if told > count:
            raise PlanError(f"a forward of {count} rows, {told} were announced")
        return parts

    def _past(self, cache: Any) -> int:
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except (AttributeError, ValueError):
            # recurrent caches do not count; the request does
            batch = getattr(self._thread, "batch", None) or self._by_cache.get(cache)
            return 0 if batch is None else batch.next_index

    def _part(self, rows: int, tokens: int, past: int, mask: Tensor | None, cache: Any, ids: Tensor | None) -> Part:
        batch = getattr(self._thread, "batch", None)
        if batch is None:
            batch = self._by_cache.get(cache) if cache is not None else self._loose
            if past == 0 or batch is None or len(batch.prompts) != rows:
                # what was cached before this session saw the cache counts as prompt
                batch = self._begin(Prompts.of(rows, past or tokens, mask))
                if cache is not None:
                    self._by_cache[cache] = batch
                    weakref.finalize(cache, self._ended.append, batch)
                else:
                    if self._loose is not None:
                        self.end(self._loose)
                    self._loose = batch
        if batch.watches:
            self._see(batch, rows, past, tokens, ids)
        batch.next_index = past + tokens
        return Part(batch, rows, past, tokens)

    def _see(self, batch: Batch, rows: int, past: int, tokens: int, ids: Tensor | None) -> None:
        """Show a batch the tokens of this forward, which it looks through for markers."""
        history = getattr(self._thread, "history", None)
        if history is not None and tuple(history.shape) == (rows, past + tokens):
            # sequences that share a prompt may have changed places since the last forward: beams
            first = 0 if rows != len(batch.prompts) else past
            batch.see(first, _numbers(history[:, first:]))
        elif ids is not None and rows == len(batch.prompts):
            batch.see(past, _numbers(ids))
        elif past < batch.prompts.length:
            batch.see(past, np.full((rows, tokens), NO_TOKEN))
        else:
            raise PlanError("a scope with after or until needs the token ids of generated tokens: run it in generate")


class GenerateCalls:
    """Reads the prompts of each ``generate`` call."""

    def __init__(self, calls: DecoderCalls) -> None:
        self.calls = calls

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the request: lengths and padding come from the mask, or from the pad token as ``generate`` does it."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds = kwargs.get("inputs_embeds")
        state = ids if ids is not None and ids.shape[-1] else embeds
        if state is None:
            self.calls.open(Prompts.of(1, 1, None))  # generate starts from the bos token
            return
        batch, length = state.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None and state is ids:
            mask = _mask_of(ids, kwargs.get("generation_config") or module.generation_config, kwargs)
        self.calls.open(Prompts.of(batch, length, mask))

    def after(self, output: Any) -> None:
        """Close the request."""
        self.calls.close()


class PrepareCalls:
    """Sees the whole sequences before each forward of ``generate``."""

    def __init__(self, calls: DecoderCalls) -> None:
        self.calls = calls

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the tokens."""
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            self.calls.remember(ids)

    def after(self, output: Any) -> None:
        """Nothing to do."""


def _numbers(ids: Tensor) -> Ints:
    return ids.to("cpu", torch.int64).numpy()


def _mask_of(ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor | None:
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()
