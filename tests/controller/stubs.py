"""Controllers with known scores, and what a plan adds to the residual stream."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from steerkern.decisions import Read

READS = (Read(1, "resid_post"),)


class Stub:
    """Fixed layer weights, and a strength that is the same for all prompts or read off the first state."""

    every_token = False

    def __init__(self, s, w, reads=READS, width=64):
        self.s, self.w, self.reads, self.width = s, torch.tensor(w), reads, width
        self.layers = tuple(range(len(w)))
        self.seen = []

    def gains(self, states):
        self.seen.append(states.clone())
        s = self.s(states) if callable(self.s) else torch.full((len(states),), float(self.s))
        return s[:, None] * self.w

    def to_record(self):
        return {"s": str(self.s)}, {"w": self.w}


@contextmanager
def injections(model):
    """What is added to each block's output after it was returned: per forward ``[L, B, S, H]``.

    Fused sites edit that very tensor, inside the norm that reads it.
    """
    forwards, kept = [], {}

    def after_block(module, args, output):
        kept[module] = (output, output.detach().clone())

    def after_model(module, args, output):
        forwards.append(torch.stack([now - then for now, then in kept.values()]))

    handles = [block.register_forward_hook(after_block) for block in model.model.layers]
    handles.append(model.model.register_forward_hook(after_model))
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()
