"""Two-phase requests: read the prompt's states, decide, and steer what follows by the decision.

Where the deciding steps write generated tokens only, the states are read while the prompt runs anyway. Where they also
write prompt tokens, the decision has to be there first: the prompt runs once more ahead, without a cache and unsteered,
up to the last block that is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..decisions import Read
from ..errors import PlanError
from ..program import Program
from ..steps import Step
from .batch import Batch
from .decoder import block_input, block_output
from .patch import suspended
from .rows import Part
from .sites import Anatomy
from .verdicts import Reading, Verdicts

Observer = Callable[[Tensor], None]


class Observed(Protocol):
    """A point that shows the states that arrive at it."""

    number: int | None
    streams: str
    observer: Observer | None


class _Seen(Exception):
    """Ends the run ahead after the last state that is read."""


class Deciding(Verdicts):
    """Makes the decisions of the batches that a session runs."""

    def __init__(self, program: Program, anatomy: Anatomy, points: Sequence[Observed]) -> None:
        super().__init__(program)
        self.anatomy = anatomy
        self.points = {point.number: point for point in points if point.number is not None}
        self._readings: dict[int, Reading] = {}
        self._watched: list[Observed] = []

    def check(self, steps: Sequence[Step]) -> None:
        """Raise PlanError where a decision reads a state that has several streams."""
        for step in steps:
            for decision in step.decisions:
                for read in decision.reads:
                    if self.points[self.program.number(read.layer, read.site)].streams != "none":
                        raise PlanError(f"{read}: the state has several streams there, which cannot be read")

    def before(self, parts: Sequence[Part], inputs: dict[str, Any]) -> None:
        """Decide what can be decided before a forward of ``parts``, and watch for the rest.

        ``inputs`` are the decoder's arguments, of which a run ahead takes tokens and positions.

        Raises:
            PlanError: a plan that writes prompt tokens and a forward without the whole prompt.
        """
        offset = 0
        for part in parts:
            batch = part.batch
            if not batch.decided:
                steps = [step for step in batch.steps() if step.decisions]
                if not steps:
                    batch.decided = True
                elif any(step.tokens.writes_prompt and not step.each_token for step in steps):
                    self._run_ahead(part, steps, inputs, len(parts))
            if not batch.decided or batch.each_token:
                self._watch(part, offset)
            offset += part.rows * part.tokens

    def after(self, parts: Sequence[Part]) -> None:
        """Decide about the batches whose prompts have now run."""
        self._unwatch()
        for part in parts:
            batch = part.batch
            if not batch.decided and part.past + part.tokens >= batch.prompts.length:
                self.decide(batch, self._readings.pop(batch.number, Reading(batch)))

    def abandon(self) -> None:
        """Leave a forward that raised."""
        self._unwatch()

    def restart(self, batch: Batch) -> None:
        """Forget what was read of a prompt that runs from its start again."""
        self._readings.pop(batch.number, None)

    def drop(self, batch: Batch) -> None:
        """Forget a batch that ended."""
        self._readings.pop(batch.number, None)
        super().drop(batch)

    # what is watched

    def _watch(self, part: Part, offset: int) -> None:
        """Let the points that this part's decisions read take down what arrives in the coming forward."""
        batch, now = part.batch, Reading(part.batch)
        once = [d for s in batch.steps() for d in s.decisions if not s.each_token] if not batch.decided else []
        kept = self._readings.setdefault(batch.number, Reading(batch)) if once else now
        wanted = {read: kept for decision in once for read in decision.reads}
        for read, reading in wanted.items():
            self._look(read, *self._rows(part, read, offset), reading, None)
        always = [step for step in batch.steps() if step.each_token]
        if always:
            self.set_gains(batch, {step: torch.zeros(len(batch.prompts), 1) for step in always})
        for step in always:
            assert step.controller is not None
            self._watch_each_token(step, part, offset)

    def _watch_each_token(self, step: Step, part: Part, offset: int) -> None:
        """Ask the controller as soon as its last state of this forward has arrived."""
        controller = step.controller
        assert controller is not None
        reading, missing = Reading(part.batch), set(controller.reads)
        rows, prompts = self._last_rows(part, offset)

        def arrived(read: Read) -> None:
            missing.discard(read)
            if not missing:
                self.set_gains(part.batch, {step: controller.gains(reading.stack(controller.reads))})

        for read in controller.reads:
            self._look(read, rows, prompts, reading, arrived)

    def _look(
        self, read: Read, rows: Tensor, prompts: Tensor, reading: Reading, arrived: Callable[[Read], None] | None
    ) -> None:
        """Have ``rows [k]`` of the state at a read's site taken down for ``prompts [k]``."""
        if not len(rows):
            return
        point = self.points[self.program.number(read.layer, read.site)]
        earlier = point.observer

        def observe(state: Tensor) -> None:
            if earlier is not None:
                earlier(state)
            flat = state.detach().reshape(-1, state.shape[-1])
            reading.take(read, prompts, flat[rows.to(flat.device)])
            if arrived is not None:
                arrived(read)

        point.observer = observe
        self._watched.append(point)

    def _unwatch(self) -> None:
        for point in self._watched:
            point.observer = None
        self._watched = []

    def _rows(self, part: Part, read: Read, offset: int) -> tuple[Tensor, Tensor]:
        """Rows of the coming forward that a read asks for, and the prompts that they belong to."""
        prompts, times = part.batch.prompts, part.rows // len(part.batch.prompts)
        if read.token == "mean":
            spans = [(max(a, part.past), min(b, part.past + part.tokens)) for a, b in _spans(prompts)]
        else:
            at = prompts.place(read.token).tolist()
            spans = [(k, k + 1) if part.past <= k < part.past + part.tokens else (0, 0) for k in at]
        rows: list[int] = []
        owners: list[int] = []
        for i, (first, end) in enumerate(spans):
            base = offset + i * times * part.tokens - part.past
            rows += range(base + first, base + end)
            owners += [i] * max(0, end - first)
        return torch.tensor(rows, dtype=torch.long), torch.tensor(owners, dtype=torch.long)

    def _last_rows(self, part: Part, offset: int) -> tuple[Tensor, Tensor]:
        """The last token of each sequence in this forward (of its prompt, while that runs)."""
        prompts, times = part.batch.prompts, part.rows // len(part.batch.prompts)
        end = part.past + part.tokens
        last = [end - 1 if end > prompts.length else min(b, end) - 1 for _, b in _spans(prompts)]
        rows = [offset + i * times * part.tokens + k - part.past for i, k in enumerate(last)]
        return torch.tensor(rows), torch.arange(len(rows))

    # the run ahead

    def _run_ahead(self, part: Part, steps: Sequence[Step], inputs: dict[str, Any], parts: int) -> None:
        """Run the prompt unsteered up to the last state that is read, and decide."""
        batch, prompts = part.batch, part.batch.prompts
        if parts > 1 or part.past or part.tokens != prompts.length:
            raise PlanError(
                "a plan that decides from the prompt and writes prompt tokens needs the whole prompt in one forward; "
                "give it scope 'decode'"
            )
        reading = Reading(batch)
        wanted: dict[int, list[Read]] = {}
        for decision in {id(d): d for step in batch.steps() for d in step.decisions}.values():
            for read in decision.reads:
                here = wanted.setdefault(self.program.number(read.layer, read.site), [])
                if read not in here:
                    here.append(read)

        def arrived(number: int, state: Tensor) -> None:
            flat = state.detach().reshape(-1, state.shape[-1])
            for read in wanted.pop(number, []):
                rows, owners = self._rows(part, read, 0)
                reading.take(read, owners, flat[rows.to(flat.device)])
            if not wanted:
                raise _Seen

        with suspended(self.anatomy.model), torch.no_grad():
            handles = [_hook(self.anatomy, number, arrived) for number in wanted]
            try:
                with contextlib.suppress(_Seen):
                    self.anatomy.decoder(**_ahead(inputs, part))
            finally:
                for handle in handles:
                    handle.remove()
        self.decide(batch, reading)


def _spans(prompts: Any) -> list[tuple[int, int]]:
    return list(zip(prompts.start.tolist(), prompts.stop.tolist(), strict=True))


def _hook(anatomy: Anatomy, number: int, arrived: Callable[[int, Tensor], None]) -> Any:
    found = anatomy.sites[number]
    if found.fused is not None:
        module: nn.Module = found.fused.module
        return module.register_forward_pre_hook(lambda _, args: arrived(number, args[0]))
    if found.site.name == "resid_post":
        return found.door.register_forward_hook(lambda _, __, output: arrived(number, block_output(output)))
    return found.door.register_forward_pre_hook(
        lambda _, args, kwargs: arrived(number, block_input(args, kwargs)), with_kwargs=True
    )


def _ahead(inputs: dict[str, Any], part: Part) -> dict[str, Any]:
    """Arguments of a forward of the same prompt without a cache."""
    names = ("input_ids", "inputs_embeds", "position_ids")
    kept = {name: inputs[name] for name in names if inputs.get(name) is not None}
    prompts = part.batch.prompts.repeated(part.rows // len(part.batch.prompts))
    column = torch.arange(part.tokens)
    start, stop = torch.from_numpy(prompts.start)[:, None], torch.from_numpy(prompts.stop)[:, None]
    mask = (start <= column) & (column < stop)
    state = kept.get("input_ids", kept.get("inputs_embeds"))
    if not bool(mask.all()):
        kept["attention_mask"] = mask.long().to(state.device)  # type: ignore[union-attr]
    return {**kept, "use_cache": False}
