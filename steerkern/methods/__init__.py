"""Published systems that read and steer activations, one module each: ``run(...) -> Report``.

The first parameters of a ``run`` name what it needs (:data:`INPUTS`); its keyword parameters are its options, each
annotated with what it is. ``steerkern run NAME`` is made of that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from ..report import Report

__all__ = ["SYSTEMS", "System", "get"]

INPUTS = ("subject", "sets", "other")
"""The model; sets of prompts; a second model."""


@dataclass(frozen=True)
class System:
    """A published system: the module of that name here, its title and where it was published."""

    name: str
    title: str
    paper: str
    organism: str = "planted"
    """The bundled model that it is shown on."""

    def load(self) -> Callable[..., Report]:
        """Its ``run``."""
        module = importlib.import_module(f"{__name__}.{self.name.replace('-', '_')}")
        run: Callable[..., Report] = module.run
        return run


SYSTEMS = {
    system.name: system
    for system in (
        System("harmfulness-vs-refusal", "Harmfulness and refusal as separate directions, Latent Guard", "2507.11878"),
        System("post-training", "What post-training changes: knowledge, truth, refusal, confidence", "2504.02904", "base"),
        System("steering-baselines", "Directional ablation, CAA, ActAdd, RepE, ITI, Angular, CAST", "2406.11717"),
        System("refusal-cliff", "Refusal cliff in reasoning models, Cliff-as-a-Judge", "2510.06036", "thinking"),
    )
}


def get(name: str) -> System:
    """The system of a name.

    Raises:
        ValueError: listing the names.
    """
    try:
        return SYSTEMS[name]
    except KeyError:
        raise ValueError(f"no system {name!r}; there are {', '.join(SYSTEMS)}") from None
