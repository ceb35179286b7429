"""Do tenants leak into each other? ``python -m benchmarks.isolation [--rows N] [--json]``

Thirty-two tenants each steer along an axis of their own, in one session of four threads: batches mix tenants and plain
rows at random, requests fail and are given up at random, plans are swapped and rescaled while others run. The model has
no attention and no MLP to speak of (their output matrices are zero), so each row of its residual stream is its token's
embedding plus what was written to it, and every coordinate is known to the bit. A control in which the row map is
wrong on purpose has to be found out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import steerkern as sk
from steerkern.runtime.rows import RowMap

TENANTS, THREADS, WIDTH, LAYERS, VOCABULARY = 32, 4, 64, 2, 50
SCOPES = ("all", "prompt", "decode", "reply")
BATCH, PROMPT, TOKENS = 32, 48, 8
FAILS = 0.02
"""Share of forwards that raise in the middle; as many requests are given up before they are done."""


@dataclass
class Count:
    """What was run, and what was found."""

    rows: int = 0
    steered: int = 0
    leaked: int = 0
    """Rows of which some coordinate is not what its own plan makes of it."""
    requests: int = 0
    failed: int = 0
    given_up: int = 0
    swaps: int = 0
    errors: list[str] = field(default_factory=list)

    @staticmethod
    def sum(counts: Sequence[Count]) -> Count:
        """All of them together."""
        made = [asdict(count).values() for count in counts]
        return Count(*(sum(values[1:], values[0]) for values in map(list, zip(*made, strict=True))))


class Failure(Exception):
    """A forward that fails on purpose."""


def transparent() -> LlamaForCausalLM:
    """A model whose residual stream holds embeddings and edits, and whose first coordinates are the tenants'."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=PROMPT + TOKENS,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, : TENANTS + THREADS] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def plan(tenant: int, strength: float) -> sk.Plan:
    """Adds ``strength`` to coordinate number ``tenant`` at every layer, on the tokens of the tenant's scope."""
    axis = torch.zeros(WIDTH)
    axis[tenant] = 1.0
    return sk.Plan(sk.add(axis, strength), layers="all", scope=SCOPES[tenant % 4], name=f"t{tenant}")


def strength_of(tenant: int) -> float:
    """A power of two apart from others, so that sums are exact."""
    return (tenant + 1) / 8


class Worker:
    """One thread: requests of random tenants, and a tenant of its own whose plan it swaps between them."""

    def __init__(self, number: int, model: Any, session: sk.Session, rows: int, step: Any) -> None:
        self.random, self.count = random.Random(number), Count()
        self.model, self.session, self.rows, self.step = model, session, rows, step
        self.own, self.strength = TENANTS + number, 1.0
        self.embeddings = model.model.embed_tokens.weight

    def run(self) -> None:
        """Requests until enough rows were looked at."""
        while self.count.rows < self.rows and not self.count.errors:
            self._change()
            try:
                self._request()
            except Failure:
                self.count.failed += 1
            except Exception as error:
                self.count.errors.append(f"{type(error).__name__}: {error}")

    def _change(self) -> None:
        """Swap or rescale the plan of this thread's tenant, which no request holds now."""
        self.strength = self.random.choice((1.0, -2.0, 0.5, 4.0))
        if self.random.random() < 0.5:
            self.session.remove(f"t{self.own}")
            self.session.add(plan(self.own, self.strength))
        else:
            self.session.set(f"t{self.own}", scale=1.0)
            scale = self.strength / self._written()
            self.session.set(f"t{self.own}", scale=scale)
        self.count.swaps += 1

    def _written(self) -> float:
        edit = self.session._program.get(f"t{self.own}").plan.steps[0].edits[0]
        return float(next(iter(edit.rows.values())).alpha[0])

    def _request(self) -> None:
        rows = self.random.randrange(1, BATCH + 1)
        choices = [None, self.own, *range(TENANTS)]
        tenants = [self.random.choice(choices) for _ in range(rows)]
        length = self.random.randrange(1, PROMPT + 1)
        padding = [self.random.randrange(length) for _ in range(rows)]
        mask = torch.tensor([[0] * p + [1] * (length - p) for p in padding])
        cache = DynamicCache(config=self.model.config)
        names = [None if tenant is None else f"t{tenant}" for tenant in tenants]
        self.count.requests += 1
        with self.session.request(length, mask, rows=names), torch.no_grad():
            for past in (0, *range(length, length + self.random.randrange(1, TOKENS))):
                tokens = length if past == 0 else 1
                ids = torch.tensor([[self.random.randrange(VOCABULARY) for _ in range(tokens)] for _ in range(rows)])
                if past:
                    mask = torch.cat([mask, torch.ones(rows, 1, dtype=mask.dtype)], 1)
                _LOCAL.fails = self.random.random() < FAILS
                _LOCAL.seen = None
                self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                self._look(ids, tenants, padding, past, length)
                if self.random.random() < FAILS:
                    self.count.given_up += 1
                    return

    def _look(self, ids: Tensor, tenants: list[int | None], padding: list[int], past: int, length: int) -> None:
        """Compare every row with what its own plan makes of its embedding."""
        expected = self.embeddings[ids].clone()
        for row, tenant in enumerate(tenants):
            if tenant is None:
                continue
            strength = self.strength if tenant == self.own else strength_of(tenant)
            first = padding[row] if past == 0 else 0
            where = {
                "all": slice(first, None),
                "prompt": slice(first, None) if past == 0 else slice(0, 0),
                "decode": slice(0, 0) if past == 0 else slice(0, None),
                "reply": slice(length - 1, None) if past == 0 else slice(0, None),
            }[SCOPES[tenant % 4]]
            expected[row, where, tenant] += LAYERS * strength
            self.count.steered += expected[row, where].shape[0]
        wrong = int((_LOCAL.seen != expected).any(-1).sum())
        self.count.leaked += wrong
        self.count.rows += ids.numel()
        self.step(ids.numel())


_LOCAL = threading.local()


@contextlib.contextmanager
def watched(model: Any) -> Iterator[None]:
    """Keeps what leaves the last block in this thread, and fails where this thread asks for it."""

    def fail(module: Any, args: Any) -> None:
        if getattr(_LOCAL, "fails", False):
            raise Failure

    def keep(module: Any, args: Any, output: Any) -> None:
        _LOCAL.seen = output if isinstance(output, Tensor) else output[0]

    handles = (
        model.model.layers[1].register_forward_pre_hook(fail),
        model.model.layers[-1].register_forward_hook(keep),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def wrong_map() -> Iterator[None]:
    """Now and then the row map is moved by one row: the mistake that all of this is to find."""
    stock, chance = RowMap._store, random.Random(0)

    def store(self: RowMap, slots: Any) -> None:
        stock(self, slots)
        if chance.random() < 0.05:
            self.slot[:] = self.slot.roll(1)

    RowMap._store = store  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowMap._store = stock  # type: ignore[method-assign]


def measure(rows: int, *, wrong: bool = False, progress: bool = False) -> Count:
    """Run ``rows`` rows through one session of four threads."""
    model, share = transparent(), -(-rows // THREADS)
    plans = [plan(tenant, strength_of(tenant)) for tenant in range(TENANTS)]
    plans += [plan(TENANTS + thread, 1.0) for thread in range(THREADS)]
    capacity = sk.Capacity(slots=40, entries=8 * LAYERS * 40, rows=200)  # fewer slots than plans and phases: they move
    with (
        Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
        sk.steer(model, plans, silent="ignore", capacity=capacity) as session,
        watched(model),
        wrong_map() if wrong else contextlib.nullcontext(),
    ):
        task = bar.add_task("rows of the control" if wrong else "rows", total=rows)
        workers = [Worker(i, model, session, share, lambda done: bar.advance(task, done)) for i in range(THREADS)]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Count.sum([worker.count for worker in workers])


def main() -> int:
    """Print the figures; 1 if a coordinate leaked, or the control went unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the residual stream to look at")
    parser.add_argument("--json", action="store_true", help="write one JSON document to stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rows, progress=not options.json)
    control = measure(max(1000, options.rows // 50), wrong=True, progress=not options.json)
    if options.json:
        facts = {"tenants": TENANTS, "threads": THREADS, "torch": torch.__version__}
        print(json.dumps({**facts, "isolation": asdict(found), "control": asdict(control)}, indent=1))
    else:
        table = Table(title=f"{TENANTS} tenants, {THREADS} threads, one session")
        for head in ("", "isolation", "control: a wrong row map"):
            table.add_column(head, justify="right" if head else "left")
        for name, value in asdict(found).items():
            table.add_row(name.replace("_", " "), str(value), str(getattr(control, name)))
        Console().print(table)
    return 1 if found.leaked or found.errors or not control.leaked else 0


if __name__ == "__main__":
    sys.exit(main())
