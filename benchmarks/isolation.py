"""Do tenants leak into each other? ``python -m benchmarks.isolation [--rows N] [--json]``

Thirty-two tenants each steer along an axis of their own, in one session of four threads: batches mix tenants and plain
rows at random, requests fail and are given up at random, plans are swapped and rescaled while others run. The model has
no attention and no MLP to speak of (their output matrices are zero), so each row of its residual stream is its token's
embedding plus what was written to it, and every coordinate is known to the bit. A control in which the row map is
wrong on purpose has to be found out. The same is asked of the tables and the op by themselves, in
``isolation_ops.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import steerkern as sk
from benchmarks import isolation_ops
from benchmarks.gpu_gate import about
from benchmarks.isolation_ops import FAILS, TENANTS, THREADS, WIDTH, Count
from steerkern.runtime.rows import RowMap

LAYERS, VOCABULARY = 2, 50
SCOPES = ("all", "prompt", "decode", "reply")
BATCH, PROMPT, TOKENS = 32, 48, 8


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
    """The row map is moved by one row: the mistake that all of this is to find."""
    stock = RowMap._store

    def store(self: RowMap, slots: Any) -> None:
        stock(self, slots)
        count = sum(part.size for part in slots)
        self.slot[:count] = self.slot[:count].roll(1)

    RowMap._store = store  # type: ignore[method-assign]
    try:
        yield
    finally:
        RowMap._store = stock  # type: ignore[method-assign]


def measure(rows: int, step: Any = lambda count: None, *, wrong: bool = False) -> Count:
    """Run ``rows`` rows through one session of four threads."""
    model, share = transparent(), -(-rows // THREADS)
    plans = [plan(tenant, strength_of(tenant)) for tenant in range(TENANTS)]
    plans += [plan(TENANTS + thread, 1.0) for thread in range(THREADS)]
    capacity = sk.Capacity(slots=40, entries=8 * LAYERS * 40, rows=200)  # fewer slots than plans and phases: they move
    with (
        sk.steer(model, plans, silent="ignore", capacity=capacity) as session,
        watched(model),
        wrong_map() if wrong else contextlib.nullcontext(),
    ):
        workers = [Worker(i, model, session, share, step) for i in range(THREADS)]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Count.sum([worker.count for worker in workers])


def everything(rows: int, progress: bool) -> dict[str, Count]:
    """Both levels, each with its control of a fiftieth of the rows."""
    runs = {"session": measure, "op": isolation_ops.measure}
    few, found = max(4000, rows // 50), {}
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        for level, run in runs.items():
            for name, total, wrong in ((level, rows, False), (f"{level}, wrong on purpose", few, True)):
                task = bar.add_task(name, total=total)
                found[name] = run(total, lambda done, task=task: bar.advance(task, done), wrong=wrong)
    return found


def passed(found: dict[str, Count]) -> bool:
    """Nothing leaked, and every control did."""
    return all(bool(count.leaked) == ("wrong" in name) and not count.errors for name, count in found.items())


def main() -> int:
    """Print the figures; 1 if a coordinate leaked, or a control went unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the residual stream to look at, per level")
    parser.add_argument("--json", action="store_true", help="write one JSON document to stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = everything(options.rows, progress=not options.json)
    if options.json:
        facts = about(dry=False, budget=0)
        kept = {
            name: facts[name] for name in ("date", "commit", "changed", "python", "machine", "torch", "transformers")
        }
        counts = {name: asdict(count) for name, count in found.items()}
        print(json.dumps({"tenants": TENANTS, "threads": THREADS, **kept, "levels": counts}, indent=1))
    else:
        table = Table("", *found, title=f"{TENANTS} tenants, {THREADS} threads")
        for name in asdict(Count()):
            table.add_row(name.replace("_", " "), *(str(getattr(count, name)) for count in found.values()))
        Console().print(table)
    for name, count in found.items():
        if count.leaked:
            print(f"{name}: leaks found: {count.leaked} of {count.rows} rows", file=sys.stderr)
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
