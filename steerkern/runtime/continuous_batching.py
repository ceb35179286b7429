"""transformers' continuous batching, steered: plans per request, and a prefix cache that knows who was steered by what.

``generate_batch`` takes its plans from ``session.rows``, one entry per input; ``manager.add_request(..., plans=...)``
takes them by itself. Before each forward the scheduler's own state says which requests it holds and which of their
tokens; those become the parts of the row map.

Blocks of the key-value cache are shared between requests whose tokens are equal, which is wrong where they are steered
by other plans: what a plan wrote is in the keys. So blocks are looked up and registered under other token numbers from
the first token on that a plan may write: requests share a block exactly where the steering that touched it is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PlanError
from ..plan import Plan
from ..steps import Step
from .batch import Batch
from .prompts import Prompts
from .requests import DecoderCalls
from .rows import Part

_NEEDED = {
    "manager": ("add_request", "add_requests", "stop", "_create_batch_processor", "continuous_batching_config"),
    "processor": ("inputs_and_outputs", "cache", "scheduler"),
    "cache": ("search_prefix_match", "cache_allocators"),
    "allocator": ("match_prefix_blocks", "mark_complete_blocks", "tokens_per_page"),
}
_CHILD = "__child#"
_WARMUP = "__warmup"


class _Tagged(list[int]):
    """A prompt of ``generate_batch`` that knows the plans of its row."""

    names: tuple[str, ...] | None = None


@dataclass
class Request:
    """A request of the manager: its batch of one prompt, and what its blocks are known by."""

    batch: Batch
    version: str
    """Digest of the steering when it was added."""
    seen: bool = False
    """Whether it has been scheduled."""


class ManagerCalls:
    """Steers the managers that ``model.init_continuous_batching`` hands out."""

    def __init__(self, calls: DecoderCalls) -> None:
        self.calls = calls
        self._managers: weakref.WeakKeyDictionary[Any, Manager] = weakref.WeakKeyDictionary()

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing to do."""

    def after(self, manager: Any) -> None:
        """Take over a manager, once.

        Raises:
            PlanError: a manager that is put together in another way than this file knows, or replays CUDA graphs.
        """
        if manager is not None and manager not in self._managers:
            self._managers[manager] = Manager(manager, self.calls)

    def close(self) -> None:
        """Leave all managers: their requests go on unsteered, and their blocks stay under the names that they have."""
        for manager in self._managers.values():
            manager.close()


class Manager:
    """One manager whose requests are steered."""

    def __init__(self, manager: Any, calls: DecoderCalls) -> None:
        _check("manager", manager)
        if any(getattr(manager.continuous_batching_config, "cuda_graph_booleans", ())):
            raise PlanError("continuous batching that replays CUDA graphs cannot be steered: pass use_cuda_graph=False")
        self.calls = calls
        self.requests: dict[str, Request] = {}
        self.salted = True
        """Whether blocks are kept apart by steering; only a test of what goes wrong otherwise turns it off."""
        self._numbers = itertools.count()
        self._matching: str | None = None
        self._processor: Any = None
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._closed = False
        for name in ("add_request", "add_requests", "stop", "_create_batch_processor"):
            self._wrap(manager, name, getattr(self, f"_{name.removeprefix('_')}"))

    def close(self) -> None:
        """Take the wrappers off, or have them pass everything on where another session's stand around them."""
        self._closed = True
        for owner, name, wrapper in reversed(self._wrapped):
            if owner.__dict__.get(name) is wrapper:
                del owner.__dict__[name]
                if wrapper.stock is not getattr(type(owner), name, None) and not _is_method(wrapper.stock, owner, name):
                    owner.__dict__[name] = wrapper.stock
        for request in self.requests.values():
            self.calls.end(request.batch)
        self.requests.clear()

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        stock = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return stock(*args, **kwargs) if self._closed else around(stock, *args, **kwargs)

        call.stock = stock  # type: ignore[attr-defined]
        owner.__dict__[name] = call
        self._wrapped.append((owner, name, call))

    # requests come and go

    def _add_request(
        self, stock: Callable[..., Any], input_ids: list[int], request_id: str | None = None, **options: Any
    ) -> Any:
        """``add_request(ids, plans="name")``: by those plans; ``plans=None`` leaves the request alone."""
        with self.calls.rows.lock:
            if "plans" in options:
                names: tuple[str, ...] | None = _names(options.pop("plans"))
            elif isinstance(input_ids, _Tagged):
                names = input_ids.names
            elif self.calls.rows.assigned is not None:
                raise PlanError("rows are assigned to a batch: say plans=... for this request, or rows(None) first")
            else:
                names = None
            if request_id is None:
                request_id = f"steered_{next(self._numbers)}"
            batch = Batch(
                self.calls.rows.program,
                Prompts.of(1, len(input_ids), None),
                None if names is None else [names],
                f"request {request_id!r}",
            )
            self._check_steps(batch)
            self.requests[request_id] = Request(batch, self._version(batch))
            self.calls.running[batch.number] = batch
        added = None
        try:
            added = stock(list(input_ids), request_id=request_id, **options)
        finally:
            if added is None:
                self._end(request_id)
        return added

    def _add_requests(self, stock: Callable[..., Any], inputs: list[list[int]], *args: Any, **options: Any) -> Any:
        assigned = self.calls.rows.assigned
        if assigned is not None and len(assigned) != len(inputs):
            raise PlanError(f"rows name {len(assigned)} sequences, the batch has {len(inputs)} prompts")
        tagged = [_Tagged(ids) for ids in inputs]
        for i, prompt in enumerate(tagged):
            prompt.names = None if assigned is None else assigned[i]
        return stock(tagged, *args, **options)

    def _check_steps(self, batch: Batch) -> None:
        for names in batch.plans or [tuple(plan.name for plan in self.calls.rows.program.plans)]:
            for name in names:
                for step in self.calls.rows.program.get(name).plan.steps:
                    once = [d for d in step.decisions if not getattr(d, "every_token", False)]
                    if once and step.tokens.writes_prompt:
                        raise PlanError(_LATE.format(name=name, label=batch.label))

    def _stop(self, stock: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return stock(*args, **options)
        finally:
            with self.calls.rows.lock:
                for name in list(self.requests):
                    self._end(name)

    def _end(self, name: str) -> None:
        request = self.requests.pop(name, None)
        if request is not None:
            self.calls.end(request.batch)

    def _drop_ended(self) -> None:
        scheduler = self._processor.scheduler
        for name, request in list(self.requests.items()):
            if request.seen and name not in scheduler.active_requests and name not in scheduler.waiting_requests:
                self._end(name)

    # a forward

    def _create_batch_processor(self, stock: Callable[..., Any]) -> Any:
        processor = stock()
        if processor is not self._processor:
            _check("processor", processor)
            _check("cache", processor.cache)
            self._processor = processor
            self._wrap(processor.inputs_and_outputs, "prepare_batch_tensors", self._prepare)
            self._wrap(processor.cache, "search_prefix_match", self._search)
            for allocator in processor.cache.cache_allocators.values():
                _check("allocator", allocator)
                self._wrap(allocator, "match_prefix_blocks", _bound(self._match, allocator))
                self._wrap(allocator, "mark_complete_blocks", _bound(self._mark, allocator))
        return processor

    def _prepare(self, stock: Callable[..., Any], requests_in_batch: list[Any], *args: Any, **options: Any) -> Any:
        """Announce what the coming forward holds; ``stock`` moves the requests' positions on."""
        with self.calls.rows.lock:
            self._drop_ended()
            parts = [self._part(future.state, future.query_length) for future in requests_in_batch]
        made = stock(requests_in_batch, *args, **options)
        self.calls.expect(parts)
        return made

    def _part(self, state: Any, tokens: int) -> Part:
        request = self.requests.get(state.request_id) or self._unknown(state)
        batch, past = request.batch, state.position_offset
        if batch.watches:
            ids = [*state.initial_tokens, *state.generated_tokens][: past + tokens]
            if len(ids) < past + tokens:
                raise PlanError(f"{batch.label}: a scope with after or until needs tokens as they come; turn async off")
            first = past if request.seen else 0
            batch.see(first, np.array([ids[first:]]))
        request.seen = True
        batch.next_index = past + tokens
        return Part(batch, 1, past, tokens)

    def _unknown(self, state: Any) -> Request:
        """A request that ``add_request`` did not see: a second sequence for one prompt, or the manager's warm-up."""
        program, name = self.calls.rows.program, state.request_id
        parent = self.requests.get(name.rpartition(_CHILD)[0])
        if parent is None and not name.startswith(_WARMUP):
            raise PlanError(f"request {name!r} was added before this session began")
        length = getattr(state, "_true_initial_tokens", 0) or len(state.initial_tokens)
        plans = [()] if parent is None else parent.batch.plans
        batch = Batch(program, Prompts.of(1, length, None), plans, f"request {name!r}")
        if parent is not None:
            batch.decided, batch.open = parent.batch.decided, dict(parent.batch.open)
            if parent.batch.gains is not None:
                batch.gains = parent.batch.gains.clone()
                program.set_gains(batch.owners, batch.gains)
            self.calls.running[batch.number] = batch
        request = Request(batch, self._version(batch))
        if parent is not None:
            self.requests[name] = request
        return request

    # the prefix cache

    def _search(self, stock: Callable[..., Any], request_id: str, prompt_ids: list[int]) -> Any:
        self._matching = request_id
        try:
            return stock(request_id, prompt_ids)
        finally:
            self._matching = None

    def _match(self, allocator: Any, stock: Callable[..., Any], prompt_ids: list[int]) -> Any:
        return stock(self._renamed(self._matching, prompt_ids, allocator.tokens_per_page))

    def _mark(
        self, allocator: Any, stock: Callable[..., Any], request_id: str, token_ids: list[int], *args: Any
    ) -> Any:
        return stock(request_id, self._renamed(request_id, token_ids, allocator.tokens_per_page), *args)

    def _renamed(self, name: str | None, tokens: list[int], page: int) -> list[int]:
        """The tokens under which blocks of a request are known: others from the first block on that a plan writes."""
        request = self.requests.get(name or "")
        if request is None or not self.salted:
            return tokens
        with self.calls.rows.lock:
            first = self._first_written(request.batch)
            if first is None:
                return tokens
            version = self._version(request.batch)
        if version != request.version or self._reads_early(request.batch):
            version += f" {request.batch.number}"  # strength changed on the way, or all tokens must be read: no sharing
        start = min(first // page * page, len(tokens))
        return [*tokens[:start], *_renumbered(tokens[start:], version)]

    def _first_written(self, batch: Batch) -> int | None:
        """The first token that some step may write; None for a request that is left alone."""
        return min((_first(step, batch.prompts.length) for step in batch.steps()), default=None)

    def _reads_early(self, batch: Batch) -> bool:
        """Whether a decision reads another state than the last prompt token's, which is never taken from the cache."""
        return any(read.token != -1 for step in batch.steps() for d in step.decisions for read in d.reads)

    def _version(self, batch: Batch) -> str:
        """Digest of the plans of a request and their strengths."""
        program = self.calls.rows.program
        held = [program.get(name) for name in (batch.plans or [tuple(plan.name for plan in program.plans)])[0]]
        steering = sorted(f"{one.plan.digest} {one.scale!r}" for one in held)
        return hashlib.sha256(" ".join(steering).encode()).hexdigest() if steering else ""


_LATE = (
    "plan {name!r} decides from the prompt and writes prompt tokens, but {label} reads its prompt in chunks; "
    "give it scope 'decode'"
)


def _first(step: Step, prompt: int) -> int:
    """The first position that a step may write in a prompt of that many tokens; an event may come at any of them."""
    first = {"decode": prompt, "reply": prompt - 1}.get(step.tokens.phase, 0)
    return max(first, step.tokens.start)


def _renumbered(tokens: list[int], version: str) -> list[int]:
    """Token numbers mixed with the digest: equal where both are."""
    words = np.frombuffer(hashlib.shake_256(version.encode()).digest(4 * len(tokens)), np.uint32) >> 1
    mixed: list[int] = (np.array(tokens, np.int64) ^ words).tolist()
    return mixed


def _names(plans: Any) -> tuple[str, ...]:
    several: Iterable[str | Plan] = () if plans is None else [plans] if isinstance(plans, (str, Plan)) else plans
    return tuple(plan if isinstance(plan, str) else plan.name for plan in several)


def _bound(around: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(owner, *args, **kwargs)


def _is_method(stock: Any, owner: Any, name: str) -> bool:
    """Whether ``stock`` is what the class gives: then nothing has to be put back into the instance."""
    return getattr(stock, "__func__", None) is getattr(type(owner), name, None)


def _check(kind: str, thing: Any) -> None:
    missing = [name for name in _NEEDED[kind] if not hasattr(thing, name)]
    if missing:
        raise PlanError(
            f"this release of transformers has continuous batching of another make ({type(thing).__name__} has no "
            f"{missing[0]}); steerkern knows that of 5.17 to 5.23"
        )
