"""Sessions: attach plans to a model, say which rows they steer, report what they wrote, detach."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import PlanError
from ..ops import dispatch
from ..plan import Plan
from ..program import Capacity, Program, Site, needs
from .blocks import BlockSums, find_sums
from .continuous_batching import GenerateBatchCalls, ManagerCalls
from .deciding import Deciding
from .patch import attach, detach, occupied, suspended
from .points import DoorPoint, NormPoint, Point
from .prompts import Prompts
from .readings import Readings
from .receipt import PlanReceipt, Receipt
from .requests import DecoderCalls, GenerateCalls, PrepareCalls
from .rows import RowMap
from .sites import Anatomy, examine

Fuse = Literal["all", "norms", "sites", "none"]
Silent = Literal["error", "warn", "ignore"]
Part = tuple[nn.Module, str, Any]
"""A module, the kind of its handler, the handler."""
RowPlans = Sequence["str | Plan | Iterable[str | Plan] | None"]


class Session:
    """Plans attached to one model; made by :func:`steer`.

    A context manager and a handle: leaving the ``with`` block (or calling :meth:`detach`) restores the model bit for
    bit. Sessions on one model nest, and may be detached in any order; edits run in the order of attachment.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        plans: Sequence[Plan],
        backend: str,
        fuse: Fuse,
        silent: Silent,
        capacity: Capacity | None,
    ) -> None:
        self.anatomy = anatomy
        self.backend = backend
        self._silent = silent
        sites = [found.site for found in anatomy.sites]
        self._program = Program(sites, anatomy.fingerprint.width, anatomy.device, capacity or needs(plans, sites))
        for plan in plans:
            self._hold(plan)
        self._rows = RowMap(self._program)
        parts = self._make_points(fuse)
        self._points = [point for _, _, point in parts if isinstance(point, Point) and point.number is not None]
        self._deciding = Deciding(self._program, anatomy, self._points)
        for plan in plans:
            self._deciding.check(plan.steps)
        self._calls = DecoderCalls(anatomy.decoder, self._rows, self._deciding, self._edits_input())
        parts.append((anatomy.decoder, "call", self._calls))
        self._managers = ManagerCalls(self._calls)
        # a wrapper may only pass the attribute on
        generating = next((m for m in anatomy.model.modules() if hasattr(type(m), "generate")), None)
        if generating is not None:
            parts.append((generating, "generate", GenerateCalls(self._calls)))
            parts.append((generating, "prepare_inputs_for_generation", PrepareCalls(self._calls)))
            if hasattr(generating, "init_continuous_batching"):
                parts.append((generating, "init_continuous_batching", self._managers))
            if hasattr(generating, "generate_batch"):
                parts.append((generating, "generate_batch", GenerateBatchCalls(self._managers)))
        self._watch_probes()
        self._attached: list[Part] = []
        self._attach(parts)

    # attaching and detaching

    def _make_points(self, fuse: Fuse) -> list[Part]:
        steered: dict[nn.Module, int] = {}
        parts: list[Part] = []
        for number, found in enumerate(self.anatomy.sites):
            # a door comes before its norm: where an earlier session stands in the norm, this one must follow it there
            if found.fused is not None and (fuse != "none" or occupied(found.fused.module, "norm")):
                steered[found.fused.module] = number
            else:
                door = DoorPoint(found, self._program, self._rows, number, self.backend)
                parts.append((found.door, "call", door))
        for spec in self.anatomy.norms:
            at = steered.get(spec.module)
            if at is not None or fuse in ("all", "norms"):
                parts.append((spec.module, "norm", NormPoint(spec, self._program, self._rows, at, self.backend)))
        self.blocks: tuple[BlockSums, ...] = ()
        """Per block, which sums its norms' kernels make, or why none; empty unless ``fuse`` is ``all``."""
        if fuse == "all":
            standing = [module for module, kind, _ in parts if kind == "norm"]
            self.blocks = find_sums(self.anatomy.blocks, standing, self.backend)
            parts += [(sums.block, "block", sums) for sums in self.blocks if sums.norms]
        return parts

    def _attach(self, parts: Iterable[Part]) -> None:
        try:
            for part in parts:
                attach(*part)
                self._attached.append(part)
        except BaseException:
            self.detach()
            raise

    @property
    def attached(self) -> bool:
        """Whether the model is being steered by this session."""
        return bool(self._attached)

    def detach(self) -> None:
        """Restore the model; calling it again does nothing."""
        while self._attached:
            detach(*self._attached.pop())
        self._managers.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None and self._silent != "ignore":
            self._complain()

    def _complain(self) -> None:
        # a latch that stayed shut is a decision, not a mistake
        latched = {plan.name for plan in self._program.plans if all(step.latch is not None for step in plan.steps)}
        idle = [name for name, plan in self.receipt().plans.items() if plan.tokens == 0 and name not in latched]
        if not idle:
            return
        text = f"plan {idle[0]!r} wrote no token: no forward of this session reached its scope"
        if self._silent == "error":
            raise PlanError(text)
        warnings.warn(text, stacklevel=3)

    # what is steered

    def rows(self, plans: RowPlans | None) -> None:
        """Give each sequence its own plans from the next forward on; ``None`` in a row leaves it alone.

        ``session.rows(["open", None, ("open", "calm")])``; ``session.rows(None)`` gives every row every plan again.

        Raises:
            PlanError: a plan that this session does not hold. A count unlike the batch raises when that comes.
        """
        if isinstance(plans, (str, Plan)):
            raise TypeError(f"rows takes one entry per sequence, got {plans!r}")
        with self._rows.lock:
            self._rows.assign(None if plans is None else [_names(row) for row in plans])
            self._rows.forget()
            self._calls.assign(self._rows.assigned)

    def add(self, plan: Plan) -> None:
        """Hold one more plan, from the next forward on; what it decides from a prompt, from the next request on.

        Raises:
            PlanError: the plan does not fit the model, its name is taken, or the tables are full; nothing changed then.
        """
        with self._rows.lock:
            _check_plan(plan)
            self._program.check(plan)
            self._deciding.check(plan.steps)
            self._managers.check(plan)
            self._hold(plan)
            self._rows.forget()
            self._calls.edits_input = self._edits_input()
            self._watch_probes()

    def remove(self, name: str) -> None:
        """Drop a plan, from the next forward on.

        Raises:
            PlanError: no such plan, or rows are still assigned to it.
        """
        with self._rows.lock:
            if any(name in names for names in self._rows.assigned or ()):
                raise PlanError(f"plan {name!r} is assigned to rows; call rows() first")
            self._managers.drop_ended()
            for batch in self._calls.running.values():
                if batch.label and name in batch.names:
                    raise PlanError(f"plan {name!r} steers {batch.label}, which is still running")
            self._rows.forget()
            self._program.remove(name)

    def set(self, name: str, *, scale: float) -> None:
        """Multiply what a plan adds to each row by ``scale``, from the next forward on; 1 is the plan as written.

        Raises:
            PlanError: no such plan, or a scale that is not finite.
        """
        with self._rows.lock:
            self._program.set_scale(name, scale)

    @contextlib.contextmanager
    def request(
        self,
        length: int,
        attention_mask: Tensor | None = None,
        batch: int = 1,
        rows: RowPlans | None = None,
    ) -> Iterator[None]:
        """Say where the prompts of a hand-written decode loop lie; ``generate`` does this by itself.

        Needed where forwards cannot tell prompt from generated tokens: loops without a cache, or in chunks. Requests of
        several threads run side by side, one forward at a time.

        Args:
            length: columns of the prompt, padding included.
            attention_mask: ``[B, >= length]``, 0 at padding; without it ``batch`` rows have no padding.
            batch: number of sequences where there is no mask.
            rows: plans of each sequence, for this request only; without them those of :meth:`rows` hold.

        Raises:
            PlanError: ``rows`` of another length, or a plan that this session does not hold.
        """
        prompts = Prompts.of(batch if attention_mask is None else attention_mask.shape[0], length, attention_mask)
        self._calls.open(prompts, None if rows is None else [tuple(_names(row)) for row in rows])
        try:
            yield
        finally:
            self._calls.close()

    def _edits_input(self) -> bool:
        return self._program.steers(Site(0, "resid_pre"))

    def _hold(self, plan: Plan) -> None:
        _check_plan(plan)
        if plan.model is not None and plan.model != self.anatomy.fingerprint:
            raise PlanError(f"plan {plan.name!r} was made for {plan.model}, the model is {self.anatomy.fingerprint}")
        self._check_markers(plan)
        self._program.add(plan)

    def _check_markers(self, plan: Plan) -> None:
        tokens = [t for step in plan.steps for marker in step.tokens.markers for sequence in marker for t in sequence]
        if not tokens:
            return
        known = int(self.anatomy.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        if max(tokens) >= known:
            raise PlanError(f"plan {plan.name!r} waits for token {max(tokens)}, the model knows 0..{known - 1}")

    def _watch_probes(self) -> None:
        """Let the points that a probe reaches keep what it reads."""
        probing: dict[int, list[str]] = {}
        for plan in self._program.plans:
            for step in plan.probing:
                for number in self._program.reach(step):
                    probing.setdefault(number, []).append(plan.name)
        for point in self._points:
            assert point.number is not None
            names = probing.get(point.number)
            if names != (point.readings and point.readings.plans):
                point.readings = None if names is None else Readings(self._program, point.number, names)

    # what was done

    def readings(self, name: str) -> dict[Site, Tensor]:
        """The coordinates that the probes of a plan read in the last request.

        Returns:
            per site ``[B, tokens, k]`` float32 on the CPU, one column per probed direction, in residual units: the
            tokens of every forward in which some row was read, NaN at tokens outside the plan's scope.

        Raises:
            PlanError: no such plan, or it has no probe.
        """
        if not self._program.get(name).plan.probing:
            raise PlanError(f"plan {name!r} has no probe to read")
        found = {}
        for point in self._points:
            read = point.readings.of(name) if point.readings is not None else None
            if point.number is not None and read is not None:
                found[self._program.sites[point.number]] = read
        return found

    # receipts

    def receipt(self) -> Receipt:
        """Which plan wrote which sites, rows and tokens so far."""
        with self._rows.lock:
            self._rows.flush()
        ran = {point.number for point in self._points if point.calls or self._calls.compiled}
        plans = {}
        for plan in self._program.plans:
            written = self._rows.written.get(plan.name)
            numbers = sorted({n for step in plan.steps for n in self._program.reach(step)})
            sites = tuple(self._program.sites[n] for n in numbers if n in ran)
            spans = {} if written is None else {row: [(a, b) for a, b in s] for row, s in written.spans.items()}
            tokens = 0 if written is None or not sites else written.tokens
            plans[plan.name] = PlanReceipt(plan.name, sites, tokens, spans)
        return Receipt(plans)


def steer(
    model: nn.Module,
    plans: Plan | Sequence[Plan],
    *,
    backend: str | None = None,
    fuse: Fuse = "all",
    silent: Silent = "error",
    capacity: Capacity | None = None,
) -> Session:
    """Steer ``model`` by one plan or several from now on, until the session is detached.

    ``model.generate`` and plain forwards then run steered: every row by every plan, unless :meth:`Session.rows` says
    otherwise. Attaching is complete or nothing was changed.

    Args:
        model: a transformers decoder-only model; its class and parameters stay untouched.
        plans: what to do; see :class:`Plan`.
        backend: ``cpu`` or ``reference``, which works or raises; None takes the fastest that runs here.
        fuse: ``all`` replaces every norm of the decoder that the kernel can stand in for, steered or not, and on the
            CPU the residual sums that such norms read; ``norms`` leaves the sums; ``sites`` replaces only the norms of
            sites; ``none`` edits at the blocks' doors and leaves every norm stock
            that no earlier session stands in.
        silent: what leaving the ``with`` block does about a plan that wrote no token: ``error``, ``warn``, ``ignore``.
        capacity: table sizes; by default four times what ``plans`` need.

    Raises:
        PlanError: a plan that does not fit the model, or a model without decoder blocks.
        BackendError: the backend asked for cannot run.
    """
    several = [plans] if isinstance(plans, Plan) else list(plans)
    for plan in several:
        _check_plan(plan)
    if fuse not in ("all", "norms", "sites", "none"):
        raise ValueError(f"fuse must be 'all', 'norms', 'sites' or 'none', got {fuse!r}")
    if silent not in ("error", "warn", "ignore"):
        raise ValueError(f"silent must be 'error', 'warn' or 'ignore', got {silent!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    with suspended(model):
        anatomy = examine(model)
    chosen = dispatch.resolve(backend, anatomy.device, anatomy.dtype)
    return Session(anatomy, several, chosen, fuse, silent, capacity)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"a session takes plans, got {type(plan).__name__}")


def _names(row: str | Plan | Iterable[str | Plan] | None) -> list[str]:
    several = [] if row is None else [row] if isinstance(row, (str, Plan)) else list(row)
    return [plan if isinstance(plan, str) else plan.name for plan in several]
