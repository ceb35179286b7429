"""Where requests begin: calls of the decoder and of ``generate``, read for batch, positions and padding."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from . import compiled
from .rows import Prompts, RowMap


class DecoderCalls:
    """Sets the row map before each forward of a decoder.

    Inside ``generate`` (or :meth:`open`) the prompts are known. Outside, a forward without cached tokens starts a
    request and all its tokens are the prompt; one after cached tokens continues the request of that cache.
    """

    def __init__(self, decoder: nn.Module, rows: RowMap, edits_input: bool) -> None:
        self.rows = rows
        self.edits_input = edits_input
        """Whether the first block's input, which may be the caller's ``inputs_embeds``, is edited."""
        self.compiled = False
        """Whether a compiled graph has asked for its row map."""
        self._names = [name for name in inspect.signature(type(decoder).forward).parameters if name != "self"]
        self._request: Prompts | None = None
        self._by_cache: weakref.WeakKeyDictionary[Any, Prompts] = weakref.WeakKeyDictionary()
        self._setter = compiled.register(self)

    def open(self, prompts: Prompts) -> None:
        """Start a request whose prompts are known."""
        self.rows.begin(prompts)
        self._request = prompts

    def close(self) -> None:
        """End it."""
        self._request = None

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
        batch, tokens = state.shape[:2]
        kept = named.get("logits_to_keep")
        self.rows.kept = kept if type(kept) is int else 0
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        cache = named.get("past_key_values")
        if cache is None:
            cache = named.get("cache_params")
        if torch.compiler.is_compiling():
            past = 0 if cache is None else cache.get_seq_length()
            self.rows.count = batch * tokens
            compiled.set_rows(self.rows.slot, mask, past, batch, tokens, self._setter)
            return
        self._advance(batch, tokens, self._past(cache), mask, cache)

    def after(self, output: Any) -> None:
        """Leave the forward."""
        if not torch.compiler.is_compiling():
            self.rows.finish()

    def set_rows(self, batch: int, tokens: int, past: int, mask: Tensor | None) -> Tensor:
        """The slots of a forward that runs as a compiled graph, which holds the address of the row map."""
        rows = self.rows
        if batch * tokens > rows.slot.numel():
            raise PlanError(
                f"a compiled forward of {batch * tokens} rows, the row map holds {rows.slot.numel()}; "
                "run one such forward eagerly first, then compile"
            )
        self.compiled = True
        self._advance(batch, tokens, past, mask, None)
        rows.finish()
        return rows.slot[: batch * tokens]

    def _past(self, cache: Any) -> int:
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except (AttributeError, ValueError):
            # recurrent caches do not count; the request does
            return self.rows.next_index if cache in self._by_cache or self._request is not None else 0

    def _advance(self, batch: int, tokens: int, past: int, mask: Tensor | None, cache: Any) -> None:
        if self._request is None:
            prompts = self._by_cache.get(cache) if cache is not None else self.rows.prompts
            if past == 0 or prompts is None or len(prompts) != batch:
                # what was cached before this session saw the cache counts as prompt
                prompts = Prompts.of(batch, past or tokens, mask)
            if prompts is not self.rows.prompts:
                self.rows.begin(prompts)
            if cache is not None:
                self._by_cache[cache] = prompts
        self.rows.advance(batch, tokens, past)


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


def _mask_of(ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor | None:
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()
