"""transformers' continuous batching, steered: plans per request, and a prefix cache that knows who was steered by what.

``generate_batch`` takes its plans from ``session.rows``, one entry per input; ``manager.add_request(..., plans=...)``
takes them by itself. Before each forward the scheduler's own state says which requests it holds and which of their
tokens; those become the parts of the row map.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PlanError
from ..plan import Plan
from .admission import check_request, check_steps
from .batch import Batch
from .block_names import BlockNames
from .manager_parts import check, check_processor
from .prompts import Prompts
from .requests import DecoderCalls
from .rows import Part

_CHILD = "__child#"
_WARMUP = "__warmup"


class _Tagged(list[int]):
    """A prompt of ``generate_batch`` that knows the plans of its row."""

    names: tuple[str, ...] | None = None


@dataclass
class Request:
    """A request of the manager: its batch of one prompt, and what its blocks are known by."""

    batch: Batch
    names: BlockNames
    arrived: bool = False
    """Whether the scheduler has it, or had it."""
    seen: bool = False
    """Whether it was part of a forward."""


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

    def refusal(self) -> PlanError | None:
        """Why a batch of requests was refused since this was last asked: transformers logs that and goes on."""
        found = [manager.refused for manager in self._managers.values() if manager.refused is not None]
        for manager in self._managers.values():
            manager.refused = None
        return found[0] if found else None

    def check(self, plan: Plan) -> None:
        """Raise PlanError if a request that has every plan cannot be steered by this one too."""
        for request in [r for manager in self._managers.values() for r in manager.requests.values()]:
            if request.batch.plans is None and not request.batch.decided:
                check_steps(plan.name, plan.steps, request.batch)

    def drop_ended(self) -> None:
        """Forget the requests that ended since the last forward."""
        for manager in self._managers.values():
            manager.drop_ended()

    def close(self) -> None:
        """Leave all managers: their requests go on unsteered, and their blocks are not shared."""
        for manager in self._managers.values():
            manager.close()


class GenerateBatchCalls:
    """Raises what ``generate_batch`` only logs: requests that were refused."""

    def __init__(self, managers: ManagerCalls) -> None:
        self.managers = managers

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget what an earlier batch was refused for."""
        self.managers.refusal()

    def after(self, output: Any) -> None:
        """Raise the PlanError of a request, of which none has run then."""
        refused = self.managers.refusal()
        if refused is not None:
            raise refused


class Manager:
    """One manager whose requests are steered."""

    def __init__(self, manager: Any, calls: DecoderCalls) -> None:
        check("manager", manager)
        if any(getattr(manager.continuous_batching_config, "cuda_graph_booleans", ())):
            raise PlanError("continuous batching that replays CUDA graphs cannot be steered: pass use_cuda_graph=False")
        self.calls = calls
        self.requests: dict[str, Request] = {}
        self.salted = True
        """Whether blocks are kept apart by steering; only a test of what goes wrong otherwise turns it off."""
        self._numbers = itertools.count()
        self.refused: PlanError | None = None
        self._matching: str | None = None
        self._processor: Any = None
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._closed = False
        self._left: set[str] = set()  # requests that ran on when this was closed
        for name in ("add_request", "add_requests", "stop", "_create_batch_processor"):
            self._wrap(manager, name, getattr(self, f"_{name.removeprefix('_')}"))

    def close(self) -> None:
        """Take the wrappers off, or have them pass everything on where another session's stand around them."""
        with self.calls.rows.lock:
            self.drop_ended()
            self._closed, self._left = True, {name for name, request in self.requests.items() if request.seen}
        for owner, name, wrapper in reversed(self._wrapped):
            if self._left and name == "mark_complete_blocks":
                continue
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
            passed = self._closed and not (self._left and name == "mark_complete_blocks")
            return stock(*args, **kwargs) if passed else around(stock, *args, **kwargs)

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
            self.drop_ended()
            if request_id in self.requests:
                raise PlanError(f"request {request_id!r} is still running: give this one another id")
            batch = Batch(
                self.calls.rows.program,
                Prompts.of(1, len(input_ids), None),
                None if names is None else [names],
                f"request {request_id!r}",
            )
            check_request(self.calls.rows.program, batch)
            self.requests[request_id] = Request(batch, BlockNames(self.calls.rows.program, batch))
            self.calls.running[batch.number] = batch
        added = None
        try:
            added = stock(list(input_ids), request_id=request_id, **options)
        finally:
            if added is None:
                self._end(request_id)
        return added

    def _add_requests(self, stock: Callable[..., Any], inputs: list[list[int]], *args: Any, **options: Any) -> Any:
        tagged = [_Tagged(ids) for ids in inputs]
        try:
            with self.calls.rows.lock:
                program, assigned = self.calls.rows.program, self.calls.rows.assigned
                if assigned is not None and len(assigned) != len(inputs):
                    raise PlanError(f"rows name {len(assigned)} sequences, the batch has {len(inputs)} prompts")
                for i, prompt in enumerate(tagged):
                    prompt.names = None if assigned is None else assigned[i]
                    plans = None if assigned is None else [assigned[i]]
                    check_request(program, Batch(program, Prompts.of(1, len(prompt), None), plans, f"input {i}"))
            return stock(tagged, *args, **options)
        except PlanError as error:
            self.refused = error
            raise

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

    def drop_ended(self) -> None:
        """Forget the requests that the scheduler has no more."""
        if self._processor is None:
            return
        with self.calls.rows.lock:
            scheduler = self._processor.scheduler
            there = {**scheduler.waiting_requests, **scheduler.active_requests}
            for name, state in there.items():
                if _CHILD in name and name not in self.requests:
                    self._unknown(state)  # while its parent, which may have ended, is known
            for name, request in list(self.requests.items()):
                if request.arrived and name not in there:
                    self._end(name)

    def _arrive(self, stock: Callable[..., Any], state: Any) -> Any:
        """The scheduler takes a request in: a new one, or one that was evicted and starts again with its reply."""
        request = self.requests.get(state.request_id)
        if request is not None:
            request.arrived = True
            again = getattr(state, "_true_initial_tokens", 0)
            if again and len(state.initial_tokens) > again and request.batch.each_token:
                text = "was evicted from a full cache, and a plan that asks its controller at every token cannot go on"
                return self._processor._handle_request_error(PlanError(f"{request.batch.label} {text}"), state)
        return stock(state)

    def _fail(self, stock: Callable[..., Any], error: Exception, state: Any) -> Any:
        request = self.requests.get(state.request_id)
        if request is not None:
            request.arrived = True
        return stock(error, state)

    def _offload(self, stock: Callable[..., Any]) -> Any:
        """An evicted request is nowhere for a moment; nobody may look then."""
        with self.calls.rows.lock:
            return stock()

    # a forward

    def _create_batch_processor(self, stock: Callable[..., Any]) -> Any:
        processor = stock()
        if processor is not self._processor:
            check_processor(processor)
            self._processor = processor
            self._wrap(processor, "_handle_request_error", self._fail)
            self._wrap(processor.scheduler, "add_waiting_request", self._arrive)
            self._wrap(processor.offloading_manager, "offload_requests", self._offload)
            self._wrap(processor.inputs_and_outputs, "prepare_batch_tensors", self._prepare)
            self._wrap(processor.cache, "search_prefix_match", self._search)
            for allocator in processor.cache.cache_allocators.values():
                self._wrap(allocator, "match_prefix_blocks", _bound(self._match, allocator))
                self._wrap(allocator, "mark_complete_blocks", _bound(self._mark, allocator))
        return processor

    def _prepare(self, stock: Callable[..., Any], requests_in_batch: list[Any], *args: Any, **options: Any) -> Any:
        """Announce what the coming forward holds; ``stock`` moves the requests' positions on."""
        with self.calls.rows.lock:
            self.drop_ended()
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
        if request.seen and past == 0 and not batch.decided:
            self.calls.deciding.restart(batch)
        request.arrived = request.seen = True
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
        request = Request(batch, BlockNames(program, batch), arrived=True)
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
        with self.calls.rows.lock:
            request = self.requests.get(self._matching or "")
            if request is None or not self.salted:
                return stock(prompt_ids)
            if request.names.reads_early or request.names.changed:
                return stock([])
            return stock(request.names.rename(prompt_ids, allocator.tokens_per_page))

    def _mark(
        self, allocator: Any, stock: Callable[..., Any], request_id: str, token_ids: list[int], *args: Any
    ) -> Any:
        with self.calls.rows.lock:
            request = self.requests.get(request_id)
            if request_id in self._left:  # nobody else's, whatever the tokens
                token_ids = [-1 - next(self._numbers) for _ in token_ids]
            elif request is not None and self.salted:
                token_ids = request.names.rename(token_ids, allocator.tokens_per_page)
            return stock(request_id, token_ids, *args)


def _names(plans: Any) -> tuple[str, ...]:
    several: Iterable[str | Plan] = () if plans is None else [plans] if isinstance(plans, (str, Plan)) else plans
    return tuple(plan if isinstance(plan, str) else plan.name for plan in several)


def _bound(around: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(owner, *args, **kwargs)


def _is_method(stock: Any, owner: Any, name: str) -> bool:
    """Whether ``stock`` is what the class gives: then nothing has to be put back into the instance."""
    return getattr(stock, "__func__", None) is getattr(type(owner), name, None)
