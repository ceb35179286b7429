"""What a request must be to run among others: what would fail in a forward is refused before it is queued.

A forward of continuous batching that raises ends every request in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import PlanError
from ..program import Program
from ..steps import Step
from .batch import Batch
from .block_names import first_written


def check_request(program: Program, batch: Batch) -> None:
    """Raise PlanError if a request cannot be steered by its plans in forwards that hold a chunk of its prompt."""
    names = (batch.plans or [tuple(plan.name for plan in program.plans)])[0]
    keyed = [((name, i), step) for name in names for i, step in enumerate(program.get(name).plan.steps)]
    for (name, _), step in keyed:
        check_steps(name, [step], batch)
    always = [(key, step.tokens.phase) for key, step in keyed if _always(step)]
    program.check_meeting(key for key, phase in always if phase in ("all", "prompt"))
    program.check_meeting(key for key, phase in always if phase != "prompt")


def check_steps(name: str, steps: Iterable[Step], batch: Batch) -> None:
    """Raise PlanError if a request cannot be steered by these steps of the plan ``name``."""
    prompts = batch.prompts
    for step in steps:
        try:
            first = first_written(step, prompts)
            for read in (read for decision in step.decisions for read in decision.reads):
                if read.token != "mean" and not step.each_token:
                    prompts.place(read.token)
        except PlanError as error:
            raise PlanError(f"{error}, plan {name!r}, {batch.label}") from None
        if step.each_token and first < prompts.length - 1:
            raise PlanError(
                f"plan {name!r} asks its controller at every token and writes prompt tokens, but {batch.label} reads "
                "its prompt in chunks; give it scope 'reply' or 'decode'"
            )
        if step.decisions and not step.each_token and step.tokens.writes_prompt:
            raise PlanError(
                f"plan {name!r} decides from the prompt and writes prompt tokens, but {batch.label} reads its prompt "
                "in chunks; give it scope 'decode'"
            )


def _always(step: Step) -> bool:
    """Whether a step writes every token of its phase, in every request."""
    return step.tokens.positions is None and step.tokens.steady and step.latch is None
