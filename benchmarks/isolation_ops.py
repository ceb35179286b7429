"""The op level of ``benchmarks.isolation``: one program's tables and the fused op, called from several threads at once.

There are fewer slots than plans, so slots change hands all the time, also between a thread's row map and its launch; a
thread launches only while its leases hold. The control takes what it was given first for good, as a cache without
generations would.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

import steerkern as sk
from steerkern.ops.schemas import Norm
from steerkern.program import Lease, Program, Site

TENANTS, THREADS, WIDTH, ROWS, MIXED, SLOTS = 32, 4, 64, 512, 8, 12
FAILS = 0.05
"""Share of calls that raise on purpose; as many are given up before the launch."""


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


class Gate:
    """Launches run side by side; a change of the program runs alone, as the row map's lock sees to it in a session."""

    def __init__(self) -> None:
        self._free, self._launching = threading.Condition(), 0

    @contextlib.contextmanager
    def launch(self) -> Iterator[None]:
        """Beside other launches."""
        with self._free:
            self._launching += 1
        try:
            yield
        finally:
            with self._free:
                self._launching -= 1
                self._free.notify_all()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Alone."""
        with self._free:
            self._free.wait_for(lambda: self._launching == 0)
            yield


class Shared:
    """The program, and what every tenant's plan adds now: nothing while it is removed."""

    def __init__(self) -> None:
        capacity = sk.Capacity(slots=SLOTS, entries=SLOTS, rows=TENANTS)
        self.program, self.gate = Program([Site(0, "resid_pre")], WIDTH, capacity=capacity), Gate()
        self.added = dict.fromkeys(range(TENANTS), 1.0)
        for tenant in self.added:
            self.program.add(plan(tenant, 1.0))


def plan(tenant: int, strength: float) -> sk.Plan:
    """Adds ``strength`` to coordinate number ``tenant``."""
    axis = torch.zeros(WIDTH)
    axis[tenant] = 1.0
    return sk.Plan(sk.add(axis, strength), name=f"t{tenant}")


class Caller:
    """One thread: changes the plans of its own tenants, and launches over rows of anybody's."""

    def __init__(self, number: int, shared: Shared, rows: int, wrong: bool, step: Callable[[int], None]) -> None:
        self.random, self.count, self.shared, self.rows, self.step = random.Random(number), Count(), shared, rows, step
        self.own = range(number, TENANTS, THREADS)
        self.first: dict[int, Lease] | None = {} if wrong else None
        """In the control, the slot that each tenant was given first."""
        self.weight, self.random_rows = torch.ones(WIDTH), torch.Generator().manual_seed(number)

    def run(self) -> None:
        """Calls until enough rows were looked at."""
        while self.count.rows < self.rows and not self.count.errors:
            try:
                with self.shared.gate.change():
                    self._change()
                self._call()
            except Exception as error:
                self.count.errors.append(f"{type(error).__name__}: {error}")

    def _change(self) -> None:
        """Remove, put back, swap or rescale the plan of one tenant."""
        program, added, tenant = self.shared.program, self.shared.added, self.random.choice(self.own)
        strength = self.random.choice((1.0, -2.0, 0.5, 4.0))
        if tenant in added and self.random.random() < 0.5:
            program.set_scale(f"t{tenant}", strength)
            added[tenant] = strength * _written(program, tenant)
        elif tenant in added:
            program.remove(f"t{tenant}")
            del added[tenant]
        if tenant not in added and self.random.random() < 0.7:
            program.add(plan(tenant, strength))
            added[tenant] = strength
        self.count.swaps += 1

    def _leases(self, tenants: Sequence[int]) -> dict[int, Lease]:
        program = self.shared.program
        program.begin()
        found = {tenant: program.lease([(f"t{tenant}", 0)]) for tenant in tenants}
        if self.first is not None:
            found = {tenant: self.first.setdefault(tenant, lease) for tenant, lease in found.items()}
        return found

    def _call(self) -> None:
        """One launch over rows of a few tenants and plain ones."""
        n = self.random.randrange(1, ROWS + 1)
        self.count.requests += 1
        stock = torch.randn(n, WIDTH, generator=self.random_rows)
        with self.shared.gate.change():
            tenants = self.random.sample(sorted(self.shared.added), min(MIXED, len(self.shared.added)))
            leases = self._leases(tenants)
        rows = [self.random.choice([None, *tenants]) for _ in range(n)]
        if self.random.random() < FAILS:
            self.count.given_up += 1
            return
        while True:  # others may take the slots before the launch
            with self.shared.gate.launch():
                known = all(tenant in self.shared.added for tenant in leases)
                if known and (self.first is not None or all(map(self.shared.program.keeps, leases.values()))):
                    self._launch(stock, rows, leases)
                    return
            with self.shared.gate.change():
                gone = {tenant for tenant in leases if tenant not in self.shared.added}
                rows = [None if tenant in gone else tenant for tenant in rows]
                leases = self._leases([tenant for tenant in leases if tenant not in gone])

    def _launch(self, stock: Tensor, rows: list[int | None], leases: dict[int, Lease]) -> None:
        """Run the op over a copy of the rows ``[n, H]``, and compare all coordinates with what is meant."""
        expected, h = stock.clone(), stock.clone()
        steered = [(row, tenant) for row, tenant in enumerate(rows) if tenant is not None]
        slot = torch.full((len(rows),), -1, dtype=torch.int32)
        for row, tenant in steered:
            slot[row] = leases[tenant].slot
            expected[row, tenant] += self.shared.added[tenant]
        tables = self.shared.program.tables(0)
        if self.random.random() < FAILS:
            self.count.failed += 1
            with contextlib.suppress(TypeError):
                torch.ops.steerkern.steer_norm_(h, slot.long(), *tables, self.weight, None, 1e-6, Norm.LLAMA)
            expected = stock  # a call that raises has written nothing
        else:
            torch.ops.steerkern.steer_norm_(h, slot, *tables, self.weight, None, 1e-6, Norm.LLAMA)
            self.count.steered += len(steered)
        self.count.leaked += int((h != expected).any(-1).sum())
        self.count.rows += len(rows)
        self.step(len(rows))


def _written(program: Program, tenant: int) -> float:
    edit = program.get(f"t{tenant}").plan.steps[0].edits[0]
    return float(next(iter(edit.rows.values())).alpha[0])


def measure(rows: int, step: Callable[[int], None], *, wrong: bool = False) -> Count:
    """Run ``rows`` rows through one program from four threads."""
    shared = Shared()
    callers = [Caller(number, shared, -(-rows // THREADS), wrong, step) for number in range(THREADS)]
    threads = [threading.Thread(target=caller.run) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Count.sum([caller.count for caller in callers])
