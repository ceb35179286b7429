"""What ``additional_config={"steerkern": ...}`` may say, and which engine settings steering does not go with."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import PlanError
from ...vectors import finite

NAME = "steerkern"
"""The key in ``additional_config``, and the plugin's name in ``VLLM_PLUGINS``."""
PLAIN = "none"
"""What a request asks for to be left alone."""


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Args:
        plans: name -> folder or hub id of a saved plan, loaded at start.
        default: the plan of requests that do not ask for one; without it they run plain.
        folder: where plans may be loaded from at run time; without it none may.
        sites: ``plans`` puts the op into the norms that ``plans`` write or read, ``all`` into every block's first norm
            and the final one (and others where ``plans`` need them). ``all`` is taken where there is a ``folder``.
        max_plans: most plans held at once.
        max_entries: most table entries of one request, over all sites.

    Raises:
        ValueError, TypeError: a value that is not allowed.
    """

    plans: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    folder: str | None = None
    sites: str = ""
    max_plans: int = 64
    max_entries: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.plans, Mapping) or not all(isinstance(x, str) for i in self.plans.items() for x in i):
            raise TypeError(f"steerkern.plans must map names to folders, got {reprlib.repr(self.plans)}")
        if PLAIN in self.plans:
            raise ValueError(f"steerkern.plans: {PLAIN!r} means no plan and cannot name one")
        for name in ("default", "folder"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"steerkern.{name} must be a string, got {reprlib.repr(getattr(self, name))}")
        if self.default is not None and self.default not in self.plans:
            raise ValueError(f"steerkern.default {self.default!r} is none of the plans {sorted(self.plans)}")
        object.__setattr__(self, "sites", self.sites or ("all" if self.folder or not self.plans else "plans"))
        if self.sites not in ("plans", "all"):
            raise ValueError(f"steerkern.sites must be 'plans' or 'all', got {reprlib.repr(self.sites)}")
        for name in ("max_plans", "max_entries"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"steerkern.{name} must be a whole number from 1, got {getattr(self, name)!r}")
        if len(self.plans) > self.max_plans:
            raise ValueError(f"steerkern.plans names {len(self.plans)} plans, max_plans is {self.max_plans}")


def settings_of(vllm_config: Any) -> Settings | None:
    """The settings of an engine; None where it is not to be steered.

    Raises:
        ValueError, TypeError: settings that are not allowed.
    """
    given = vllm_config.additional_config
    if not isinstance(given, Mapping) or NAME not in given:
        return None
    own = given[NAME]
    if not isinstance(own, Mapping):
        raise TypeError(f"additional_config.steerkern must be an object, got {reprlib.repr(own)}")
    known = list(Settings.__dataclass_fields__)
    unknown = sorted(set(own) - set(known) - {INSTALLED})
    if unknown:
        raise ValueError(f"steerkern.{unknown[0]} is no setting; known are {', '.join(known)}")
    return Settings(**{name: value for name, value in own.items() if name != INSTALLED})


INSTALLED = "installed"
"""Key under which a worker notes the sites and the version, which compiled graphs depend on: vLLM hashes them."""


def check_engine(vllm_config: Any) -> None:
    """Raise PlanError, naming the setting, where rows of a forward are not the rows of the batch in its order."""
    parallel, passes = vllm_config.parallel_config, vllm_config.compilation_config.pass_config
    refused = {
        "enable_dbo or ubatch_size": getattr(parallel, "use_ubatching", False),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "compilation_config.pass_config.enable_sp": getattr(passes, "enable_sp", False),
    }
    found = [name for name, used in refused.items() if used]
    if found:
        raise PlanError(f"steerkern does not steer an engine with {found[0]}: it splits or moves the rows of a forward")


def check_scale(value: object, name: str) -> float:
    """A strength as a request may give it.

    Raises:
        ValueError, TypeError: not a number, not finite, or beyond ``MAX_SCALE``.
    """
    number = finite(value, name)
    if abs(number) > MAX_SCALE:
        raise ValueError(f"{name} must be between -{MAX_SCALE:g} and {MAX_SCALE:g}, got {number:g}")
    return number


MAX_SCALE = 1e4
"""Beyond this a half precision residual stream overflows."""
