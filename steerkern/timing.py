"""Time several ways of doing the same thing side by side, in one run.

A machine drifts: clocks, caches and neighbours change within seconds. So every round runs every contender once, in
an order that turns from round to round, and contenders are compared within rounds.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from .plan import Plan
from .runtime.session import steer
from .runtime.sites import block_input, find_decoder


class Quartiles(NamedTuple):
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """The quartiles of at least one value."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
        return Quartiles(low, median, high)


@dataclass(frozen=True)
class Contender:
    """One way of doing the work."""

    name: str
    run: Callable[[], Any]
    """What is timed."""
    setting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Entered before the clock starts, left after it stops."""


@dataclass(frozen=True)
class Timings:
    """Seconds of every contender in every round."""

    seconds: Mapping[str, tuple[float, ...]]

    def time(self, name: str) -> Quartiles:
        """Seconds of one run."""
        return Quartiles.of(self.seconds[name])

    def rate(self, name: str, units: float) -> Quartiles:
        """Units per second, where one run does ``units``."""
        return Quartiles.of([units / s for s in self.seconds[name]])

    def speedup(self, name: str, over: str) -> Quartiles:
        """How many times as fast ``name`` is as ``over``: the ratio within each round, not of the medians.

        >>> Timings({"slow": (2.0, 4.0, 3.0), "fast": (1.0, 2.0, 1.0)}).speedup("fast", "slow").median
        2.0
        """
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return Quartiles.of([theirs / ours for theirs, ours in pairs])

    def to_json(self) -> dict[str, list[float]]:
        """Seconds per round, in the order of the rounds."""
        return {name: list(seconds) for name, seconds in self.seconds.items()}


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int = 20,
    warmup: int = 2,
    synchronize: Callable[[], object] | None = None,
    step: Callable[[], object] | None = None,
) -> Timings:
    """Run every contender once per round and time it.

    Args:
        contenders: at least one, with names of their own.
        rounds: timed rounds; odd ones run in the opposite order, every pair of them starts with the next contender.
        warmup: rounds that are run first and not counted.
        synchronize: waits for the device, called before the clock starts and before it stops.
        step: called after every round, to show progress.

    Raises:
        ValueError: no contender, two of one name, or no round.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contenders need names of their own, at least one, got {names}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            for contender in _order(contenders, number):
                taken = _once(contender, synchronize)
                if number >= 0:
                    seconds[contender.name].append(taken)
            if step is not None:
                step()
    finally:
        if collecting:
            gc.enable()
    return Timings({name: tuple(values) for name, values in seconds.items()})


def _order(contenders: Sequence[Contender], number: int) -> list[Contender]:
    first = (number // 2) % len(contenders)
    turned = [*contenders[first:], *contenders[:first]]
    return turned if number % 2 == 0 else turned[::-1]


def _once(contender: Contender, synchronize: Callable[[], object] | None) -> float:
    wait = synchronize or (lambda: None)
    with contender.setting():
        wait()
        start = time.perf_counter()
        contender.run()
        wait()
        return time.perf_counter() - start


def decode_contenders(model: Any, inputs: Mapping[str, Any], tokens: int, plan: Plan, unit: Tensor) -> list[Contender]:
    """Greedy ``model.generate`` of ``tokens`` tokens, four ways.

    ``stock`` is the model as it is; ``hook`` ablates ``unit [H]`` at the input of every block by the usual forward
    pre-hook; ``fused`` is a session whose rows carry no plan; ``steerkern`` steers every row by ``plan``, which should
    do what the hook does.
    """
    rows = inputs["input_ids"].shape[0]

    def run() -> Tensor:
        return generate_exactly(model, inputs, tokens)

    @contextlib.contextmanager
    def unsteered() -> Iterator[None]:
        with steer(model, plan, silent="ignore") as session:
            session.rows([None] * rows)
            yield

    return [
        Contender("stock", run),
        Contender("hook", run, lambda: ablation_hooks(model, unit)),
        Contender("fused", run, unsteered),
        Contender("steerkern", run, lambda: steer(model, plan)),
    ]


def generate_exactly(model: Any, inputs: Mapping[str, Any], tokens: int) -> Tensor:
    """Greedy continuation ``[B, tokens]``, no row ending early."""
    made: Tensor = model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return made[:, inputs["input_ids"].shape[1] :]


@contextlib.contextmanager
def ablation_hooks(model: nn.Module, unit: Tensor) -> Iterator[None]:
    """Ablate ``unit [H]`` at the input of every block as steering is commonly written: a forward pre-hook per block."""

    def ablate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = block_input(args, kwargs)
        edited = h - (h @ v).unsqueeze(-1) * v
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    _, blocks = find_decoder(model)
    parameter = next(blocks.parameters())
    v = unit.to(parameter.device, parameter.dtype)
    handles = [block.register_forward_pre_hook(ablate, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
