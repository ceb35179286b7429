"""The peers by name."""

from __future__ import annotations

from . import (
    baukit,
    dialz,
    hook,
    llm_steer,
    nnsight,
    peft,
    pyvene,
    repeng,
    steering_vectors,
    steerkern,
    transformer_lens,
)
from .adapter import Adapter

ADAPTERS: tuple[Adapter, ...] = tuple(
    module.ADAPTER
    for module in (
        steerkern,
        hook,
        baukit,
        steering_vectors,
        repeng,
        dialz,
        nnsight,
        pyvene,
        transformer_lens,
        llm_steer,
        peft,
    )
)
