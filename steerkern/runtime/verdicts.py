"""What is decided about the requests of a batch, once the states that the decisions ask for are there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..decisions import Read
from ..errors import PlanError
from ..program import Program
from ..steps import Step
from .batch import Batch


@dataclass
class Reading:
    """The states of one batch that its decisions ask for."""

    batch: Batch
    states: dict[Read, Tensor] = field(default_factory=dict)
    """``[prompts, H]`` float32; of a mean, so far the sum."""
    counts: dict[Read, Tensor] = field(default_factory=dict)
    """``[prompts]`` on the CPU: tokens read."""

    def take(self, read: Read, prompts: Tensor, states: Tensor) -> None:
        """Take in ``states [k, H]`` of the prompts numbered ``prompts [k]``, which lie on the CPU."""
        total = len(self.batch.prompts)
        if read not in self.states:
            self.states[read] = states.new_zeros(total, states.shape[1], dtype=torch.float32)
            self.counts[read] = torch.zeros(total)
        self.states[read].index_add_(0, prompts.to(states.device), states.float())
        self.counts[read].index_add_(0, prompts, torch.ones(len(prompts)))

    def stack(self, reads: tuple[Read, ...]) -> Tensor:
        """``[prompts, R, H]``.

        Raises:
            PlanError: a state that no forward has shown.
        """
        for read in reads:
            if read not in self.states or bool((self.counts[read] == 0).any()):
                raise PlanError(f"{read}: the prompt ran before this session saw it, so nothing can be decided from it")
        means = [self.states[read] / self.counts[read][:, None].to(self.states[read].device) for read in reads]
        return torch.stack(means, 1)


class Verdicts:
    """Opens latches and sets gains in a program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def decide(self, batch: Batch, reading: Reading) -> None:
        """Make every decision about a batch from the states of its prompts.

        Raises:
            PlanError: a state that ``reading`` lacks.
        """
        gains: dict[Step, Tensor] = {}
        for step in batch.steps():
            if step.latch is not None and step.latch not in batch.open:
                batch.open[step.latch] = step.latch.opens(reading.stack(step.latch.reads)).cpu().numpy()
            if step.controller is not None and not step.controller.every_token:
                gains[step] = step.controller.gains(reading.stack(step.controller.reads))
        self.set_gains(batch, gains)
        batch.decided = True

    def set_gains(self, batch: Batch, gains: dict[Step, Tensor]) -> None:
        """Put ``[prompts, layers of the controller]`` of each step (or ``[prompts, 1]`` for all) where it acts."""
        if not gains:
            return
        if batch.gains is None:
            batch.gains = torch.ones(len(self.program.sites), len(batch.prompts), device=self.program.gain.device)
        made = batch.gains
        for step, values in gains.items():
            assert step.controller is not None
            batch.open[step.controller] = np.ones(len(batch.prompts), bool)
            mine = torch.from_numpy(batch.has(step)).to(made.device)
            for number, layer in self.program.places(step).items():
                column = values[:, step.controller.layers.index(layer) if values.shape[1] > 1 else 0]
                made[number] = torch.where(mine, column.to(made.device, torch.float32), made[number])
        self.program.set_gains(batch.owners, made)

    def drop(self, batch: Batch) -> None:
        """Forget a batch that ended."""
        if batch.gains is not None:
            self.program.release(batch.owners)
