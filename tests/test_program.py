"""Programs: plans come and go in tables of fixed size and address, and a slot does what its plans say, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from steerkern import Plan, PlanError, ablate, add, cap, clamp, probe, rotate
from steerkern.ops.reference import edit_rows, find_fault
from steerkern.ops.schemas import MAX_ENTRIES, Flag, Link, Mode
from steerkern.program import Capacity, Program, Site, needs

WIDTH = 6
LAYERS = 3
SITES = [Site(layer, name) for layer in range(LAYERS) for name in ("resid_pre", "resid_mid")]
SITES.append(Site(LAYERS - 1, "resid_post"))
generator = torch.Generator().manual_seed(0)
V = [torch.randn(WIDTH, generator=generator) * (1 + i) for i in range(6)]
H = torch.randn(9, WIDTH, generator=generator)

KINDS: list[Plan] = [
    Plan(add(V[0]), name="add"),
    Plan(ablate(V[:3]), layers=[0, 2], name="ablate"),
    Plan(clamp(V[1], 2.0).when(V[2], lo=0.0), name="gated"),
    Plan(rotate(V[0], V[4], 70), site="resid_post", name="rotate"),
    Plan(cap(V[3], hi=0.0), site="resid_mid", layers=1, scope="prompt", name="two") + Plan(add(V[5]), scope="decode"),
    Plan(add({1: V[1], 2: V[2]}, 0.5), keep_norm=True, name="kept"),
    Plan(probe([V[0], V[1]]), layers=0, name="probe"),
]
PLANS = [plan.named(f"p{i}") for i, plan in enumerate(KINDS)]


def program(capacity: Capacity | None = None) -> Program:
    return Program(SITES, WIDTH, capacity=capacity)


def keys(*plans: Plan) -> list[tuple[str, int]]:
    return [(plan.name, i) for plan in plans for i in range(len(plan.steps))]


def effect(program: Program, slot: int, h: Tensor = H) -> Tensor:
    """What the slot does to rows, at every site: ``[sites, N, H]``."""
    slots = torch.full((len(h),), slot, dtype=torch.int32)
    for i in range(len(program.sites)):
        assert find_fault(slots, program.tables(i)) is None
    return torch.stack([edit_rows(h, slots, program.tables(i)) for i in range(len(program.sites))])


def state(program: Program) -> list[Any]:
    """Everything that a refused call must leave as it was, bit for bit."""
    tensors = [t for i in range(len(program.sites)) for t in program.tables(i)]
    held = {name: (held.plan, held.scale, dict(held.bank_rows)) for name, held in program._held.items()}
    entries = program._entries
    blocks = {key: (block.first, block.size, set(block.slots)) for key, block in entries.blocks.items()}
    free = (list(program._free_slots), list(program._bank.free), entries.filled, program.entries_per_row)
    return [*(t.clone() for t in tensors), held, dict(program._slots), blocks, free]


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)
    )


def addresses(program: Program) -> list[int]:
    return [t.data_ptr() for i in range(len(program.sites)) for t in program.tables(i)]


# what a slot does


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_slot_does_what_its_plan_alone_does(plan: Plan) -> None:
    alone = program()
    alone.add(plan)
    crowd = program()
    for other in PLANS:
        crowd.add(other)
    for other in PLANS:
        crowd.slot(keys(other))
    assert torch.equal(effect(crowd, crowd.slot(keys(plan))), effect(alone, alone.slot(keys(plan))))


def test_rows_of_no_slot_keep_their_bits_beside_steered_ones() -> None:
    held = program()
    held.add(PLANS[0])
    slots = torch.full((len(H),), -1, dtype=torch.int32)
    slots[::2] = held.slot(keys(PLANS[0]))
    out = edit_rows(H, slots, held.tables(0))
    assert torch.equal(out[1::2], H[1::2])
    assert not torch.equal(out[::2], H[::2])


def test_a_rotation_elsewhere_does_not_break_a_site_of_fewer_entries() -> None:
    """reference.edit_rows: rows without entries looked up entry 0 of the tables, and with it a mate out of bounds."""
    held = program()
    for plan in (PLANS[3], PLANS[0]):  # the rotation's entries come first, and reach other sites than the add's
        held.add(plan)
    held.slot(keys(PLANS[3]))
    slot = held.slot(keys(PLANS[0]))
    slots = torch.full((len(H),), -1, dtype=torch.int32)
    slots[0] = slot
    out = edit_rows(H, slots, held.tables(0))
    torch.testing.assert_close(out[0], H[0] + V[0])
    assert torch.equal(out[1:], H[1:])


def test_one_slot_per_combination_whatever_its_order() -> None:
    held = program()
    for plan in PLANS[:4]:
        held.add(plan)
    one = held.slot([*keys(PLANS[1]), *keys(PLANS[0])])
    assert held.slot([*keys(PLANS[0]), *keys(PLANS[1])]) == one
    assert held.slot(keys(PLANS[0])) != one
    assert held.slot([]) == -1
    before = state(held)
    assert held.slot(keys(PLANS[0], PLANS[1])) == one
    assert same(before, state(held))


def test_the_steps_of_a_plan_can_stand_in_different_slots() -> None:
    plan = PLANS[4]
    held = program()
    held.add(plan)
    prompt, decode, both = held.slot([("p4", 0)]), held.slot([("p4", 1)]), held.slot(keys(plan))
    assert len({prompt, decode, both}) == 3
    change = [effect(held, slot) - H for slot in (prompt, decode, both)]
    torch.testing.assert_close(change[0] + change[1], change[2], rtol=0, atol=1e-5)


def test_reach_counts_sites_and_keeps_the_plans_layers() -> None:
    held = program()
    assert held.reach(Plan(add(V[0]), site="resid_post").steps[0]) == (2, 4, 6)
    assert held.reach(Plan(add(V[0]), layers=[0, 1]).steps[0]) == (0, 2)
    assert held.reach(Plan([add({1: V[0], 2: V[1]}), add({0: V[0], 1: V[1]})], layers=1).steps[0]) == (2,)
    assert held.reach(Plan(add({0: V[0], 2: V[1]})).steps[0]) == (0, 4)


def test_a_probe_may_meet_a_plan_that_keeps_norms() -> None:
    """A step that only reads has no norm to keep."""
    kept, reads = Plan(add(V[0]), keep_norm=True, name="kept"), Plan(probe(V[1]), name="reads")
    held = program()
    held.add(reads)
    held.add(kept)
    slot = held.slot(keys(reads, kept))
    assert torch.equal(effect(held, slot), effect(held, held.slot(keys(kept))))
    assert int(held.tables(0).span[slot, 2]) == Mode.KEEP_NORM
    assert int(held.tables(0).span[held.slot(keys(reads)), 2]) == 0
    torch.testing.assert_close(effect(held, slot)[0].norm(dim=1), H.norm(dim=1))


def test_keep_norm_is_asked_for_site_by_site() -> None:
    held = program()
    held.add(Plan(add(V[0]), keep_norm=True, layers=[0, 1], name="kept"))
    held.add(Plan(add(V[2]), layers=2, name="apart"))
    slot = held.slot([("kept", 0), ("apart", 0)])  # they never meet
    assert [int(held.tables(i).span[slot, 2]) for i in (0, 2, 4)] == [Mode.KEEP_NORM, Mode.KEEP_NORM, 0]


# limits: refused in one sentence, and nothing has changed

WIDE = torch.eye(WIDTH)


def filled(capacity: Capacity, with_slot: list[Plan], without: list[Plan]) -> Program:
    held = program(capacity)
    for plan in (*with_slot, *without):
        held.add(plan)
    for plan in with_slot:
        held.slot(keys(plan))
    return held


def many(count: int, name: str, layers: Any = "all") -> Plan:
    """A plan with ``count`` entries on a row."""
    return Plan([add(WIDE[: min(WIDTH, count - i)]) for i in range(0, count, WIDTH)], layers=layers, name=name)


ROOM = Capacity(9, 999, 99)
ONE, THREE = PLANS[0], PLANS[1]  # 1 vector at three sites; 3 vectors at two of these
REFUSED: dict[str, tuple[Program, Callable[[Program], object], str]] = {
    "slots": (
        filled(Capacity(1, 99, 99), [ONE], [THREE]),
        lambda p: p.slot(keys(THREE)),
        "^plans 'p1' need a slot, all 1 are taken$",
    ),
    "entries": (
        filled(Capacity(9, 5, 99), [ONE], [THREE]),
        lambda p: p.slot(keys(ONE, THREE)),  # both at two sites, one at the third
        "^plans 'p0[+]p1' need 5 entries, 4 of 5 are free$",
    ),
    "rows": (
        filled(Capacity(9, 99, 3), [ONE], []),
        lambda p: p.add(THREE),
        "^plan 'p1' needs 3 bank rows, 2 of 3 are free$",
    ),
    "name": (
        filled(ROOM, [ONE], []),
        lambda p: p.add(THREE.named("p0")),
        "^plan 'p0' is in this session already; remove it or name the new one otherwise$",
    ),
    "width": (
        filled(ROOM, [ONE], []),
        lambda p: p.add(Plan(add(torch.ones(5)), name="x")),
        "^plan 'x' has width 5, the model has 6$",
    ),
    "layer": (
        filled(ROOM, [ONE], []),
        lambda p: p.add(THREE + Plan(add(V[0]), layers=[1, 3], name="x")),
        r"^layer 3: the model has 3 decoder layers \(0\.\.2\), plan 'p1\+x'$",
    ),
    "64 entries": (
        filled(ROOM, [many(40, "a", 1)], [many(25, "b")]),
        lambda p: p.slot([("a", 0), ("b", 0)]),
        r"^resid_pre\[1\]: plans 'a\+b' put 65 entries on one row, allowed are 64$",
    ),
    "keep_norm": (
        filled(ROOM, [Plan(add(V[0]), keep_norm=True, layers=[0, 1], name="kept")], [Plan(add(V[1]), name="free")]),
        lambda p: p.slot([("kept", 0), ("free", 0)]),
        r"^resid_pre\[0\]: plans 'kept\+free' meet on one row, and only some of them keep its norm$",
    ),
    "unknown plan": (
        filled(ROOM, [ONE], []),
        lambda p: p.slot([("p0", 0), ("p9", 0)]),
        "^no plan 'p9' in this session; known are 'p0'$",
    ),
    "unknown plan to remove": (filled(ROOM, [], []), lambda p: p.remove("p0"), "^no plan 'p0' .*; known are none$"),
    "scale NaN": (
        filled(ROOM, [ONE], []),
        lambda p: p.set_scale("p0", math.nan),
        "^scale of plan 'p0' must be finite in float32, got nan$",
    ),
    "scale times scale": (
        filled(ROOM, [Plan(add(V[0]), scale=1e30, name="loud")], []),
        lambda p: p.set_scale("loud", 1e30),
        r"^scale of plan 'loud' must be finite in float32, got 1.*e\+60$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_changes_nothing(name: str) -> None:
    held, call, text = REFUSED[name]
    before = state(held)
    with pytest.raises(PlanError, match=text):
        call(held)
    assert same(before, state(held))


def test_a_scale_that_is_no_number_is_a_type_error() -> None:
    held = filled(ROOM, [ONE], [])
    with pytest.raises(TypeError, match="scale of plan 'p0' must be a number, got '2'"):
        held.set_scale("p0", "2")  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [Capacity(0, 1, 1), Capacity(1, -1, 1), Capacity(1, 1, 0)])
def test_a_program_that_can_hold_nothing_is_refused(capacity: Capacity) -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1 of each, got Capacity"):
        program(capacity)


def test_tables_filled_to_the_last_place() -> None:
    held = filled(Capacity(2, 4, 4), [ONE, THREE], [])
    assert torch.equal(effect(held, 1), effect(filled(ROOM, [THREE], []), 0))
    assert (held._entries.room, held._bank.free, held._free_slots) == (0, [], [])


def test_64_entries_from_several_plans_are_allowed() -> None:
    held = filled(ROOM, [], [many(40, "a", 1), many(24, "b", 1)])
    slot = held.slot([("a", 0), ("b", 0)])
    assert held.entries_per_row == MAX_ENTRIES
    total = sum(edit.rows[None].vectors.sum(0) for plan in held.plans for edit in plan.steps[0].edits)
    torch.testing.assert_close(effect(held, slot)[2], H + total, rtol=0, atol=1e-4)  # 64 sums of size 10 in fp32


def test_the_capacity_asked_for_holds_the_plans_four_times() -> None:
    plans = [many(30, "wide"), *PLANS]
    capacity = needs(plans, SITES)
    held = program(capacity)
    for times in range(4):
        for plan in plans:
            held.add(plan.named(f"{plan.name} {times}"))
            held.slot([(f"{plan.name} {times}", i) for i in range(len(plan.steps))])
    assert len(held.plans) == 4 * len(plans)


# coming and going


def test_a_removed_plan_leaves_its_slot_without_effect() -> None:
    held = filled(ROOM, [ONE, THREE], [])
    slot, other = held.slot(keys(ONE)), held.slot(keys(THREE))
    both = held.slot(keys(ONE, THREE))
    before = effect(held, other)
    held.remove("p0")
    assert "p0" not in held
    for gone in (slot, both):
        assert all(torch.equal(rows, H) for rows in effect(held, gone))
    assert torch.equal(effect(held, other), before)
    with pytest.raises(PlanError, match="no plan 'p0'"):
        held.slot(keys(ONE))


def test_rows_entries_and_slots_are_used_again_without_a_trace_of_the_old_plan() -> None:
    held = program(Capacity(2, 21, 8))
    held.add(ONE)
    held.slot(keys(ONE))
    places = addresses(held)
    for i in range(20):
        plan = KINDS[i % len(KINDS)].named("guest")
        held.add(plan)
        slot = held.slot(keys(plan))
        held.gain[:, slot] = 5.0  # a controller's, for the guest only
        alone = filled(ROOM, [plan], [])
        assert torch.equal(effect(held, slot), effect(alone, 0))
        held.remove("guest")
    assert bool((held.gain[:, held.slot(keys(ONE))] == 1).all())
    held.add(THREE)
    assert bool((held.gain[:, held.slot(keys(THREE))] == 1).all())
    assert addresses(held) == places


def test_entries_left_in_pieces_can_be_filled_by_a_larger_plan() -> None:
    held = program(Capacity(9, 24, 99))
    small = Plan(add({layer: V[layer] for layer in range(LAYERS)}))
    for i in range(8):  # 3 entries each
        held.add(small.named(f"small {i}"))
        held.slot([(f"small {i}", 0)])
    assert held._entries.room == 0
    before = effect(held, held.slot([("small 1", 0)]))
    for i in (0, 2, 4, 6):
        held.remove(f"small {i}")
    large = many(12, "large", layers=0)  # where no gap has more than 3
    held.add(large)
    slot = held.slot(keys(large))
    assert torch.equal(effect(held, slot), effect(filled(ROOM, [large], []), 0))
    for i in (1, 3, 5, 7):
        assert torch.equal(effect(held, held.slot([(f"small {i}", 0)])), before)


def test_a_new_scale_reaches_every_slot_of_the_plan_and_no_other() -> None:
    held = filled(ROOM, [ONE, THREE, PLANS[4]], [])
    combined = held.slot(keys(ONE, THREE))
    apart = held.slot([("p4", 1)])
    quiet = [held.slot(keys(THREE)), held.slot(keys(PLANS[4])), apart]
    before = [effect(held, slot) for slot in quiet]
    changes = [effect(held, slot) - H for slot in (held.slot(keys(ONE)), held.slot(keys(THREE)))]
    held.set_scale("p0", -3.0)
    fresh = filled(ROOM, [], [ONE.scaled(-3.0), THREE])
    assert torch.equal(effect(held, held.slot(keys(ONE))), effect(fresh, fresh.slot(keys(ONE))))
    assert torch.equal(effect(held, combined), effect(fresh, fresh.slot(keys(ONE, THREE))))
    torch.testing.assert_close(effect(held, combined) - H, -3 * changes[0] + changes[1], rtol=0, atol=1e-5)
    assert all(torch.equal(effect(held, slot), old) for slot, old in zip(quiet, before, strict=True))
    later = held.slot(keys(ONE, PLANS[4]))  # a slot made after the change has it too
    fresh.add(PLANS[4])
    assert torch.equal(effect(held, later), effect(fresh, fresh.slot(keys(ONE, PLANS[4]))))
    held.set_scale("p0", 0.0)
    assert all(torch.equal(rows, H) for rows in effect(held, held.slot(keys(ONE))))


def test_a_vector_that_edits_share_takes_one_bank_row() -> None:
    edit = ablate(V[0]).when(V[1], lo=0)
    held = program()
    held.add(Plan(edit, scope="prompt", name="a") + Plan(edit, scope="decode", scale=2.0, name="b"))
    assert len(held._bank.free) == held.capacity.rows - 2
    held.remove("a+b")
    assert len(held._bank.free) == len(set(held._bank.free)) == held.capacity.rows


def test_copies_of_a_plan_share_their_rows_until_the_last_of_them_goes() -> None:
    held = filled(ROOM, [THREE, THREE.named("copy")], [])
    assert len(held._bank.free) == held.capacity.rows - 3
    held.remove("p1")
    held.add(PLANS[6])  # would take the rows if they were free
    alone = filled(ROOM, [THREE], [])
    assert torch.equal(effect(held, held.slot([("copy", 0)])), effect(alone, 0))
    held.remove("copy")
    assert len(held._bank.free) == held.capacity.rows - 2


def test_sites_share_entries_where_the_same_vectors_act_and_only_there() -> None:
    held = filled(ROOM, [ONE], [PLANS[5], Plan(add(V[3]), layers=0, name="first")])
    assert [held.tables(i).span[0].tolist() for i in (0, 2, 4)] == [[0, 1, 0]] * 3
    meeting = held.slot([*keys(ONE), ("first", 0)])
    assert [held.tables(i).span[meeting].tolist() for i in (0, 2, 4)] == [[1, 2, 0], [3, 1, 0], [3, 1, 0]]
    by_layer = held.slot(keys(PLANS[5]))
    assert [held.tables(i).span[by_layer].tolist() for i in (2, 4)] == [[4, 1, 1], [5, 1, 1]]
    assert held._entries.filled == 6


def test_steers_says_of_a_site_whether_a_plan_acts_there() -> None:
    held = filled(ROOM, [], [PLANS[4], PLANS[5]])
    assert [i for i, site in enumerate(SITES) if held.steers(site)] == [0, 2, 3, 4]
    assert not held.steers(Site(LAYERS, "resid_pre"))
    held.remove(PLANS[4].name)
    assert [i for i, site in enumerate(SITES) if held.steers(site)] == [2, 4]


def test_only_what_is_needed_is_read_and_written() -> None:
    plan = Plan([add(V[0]), probe(V[1]), ablate(V[2]).when(V[3], lo=0), rotate(V[0], V[1], 3)], layers=0, name="x")
    held = filled(ROOM, [plan], [])
    tables = held.tables(0)
    first, count, _ = tables.span[0].tolist()
    flags = [Flag(f) for f in tables.links[Link.FLAGS, first : first + count].tolist()]
    both = Flag.READ | Flag.WRITE
    assert flags == [Flag.WRITE, Flag.READ, Flag.READ, both, both | Flag.PAIR, both | Flag.PAIR]


class Comings(RuleBasedStateMachine):
    """Plans added, removed, rescaled and combined in any order, against a program built from scratch each time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = program(Capacity(slots=4, entries=14, rows=12))
        # as on a GPU: the tables that a kernel reads are not the host's
        for name in ("links", "fields", "span"):
            setattr(self.held._entries, name, getattr(self.held._entries, name).clone())
        self.places = addresses(self.held)
        self.scales: dict[str, float] = {}
        self.slots: dict[frozenset[tuple[str, int]], int] = {}

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The result, or None where the program refused and stayed as it was."""
        before = state(self.held)
        try:
            return call() or 0
        except PlanError:
            assert same(before, state(self.held))
            return None

    @rule(i=st.integers(0, len(PLANS) - 1))
    def add(self, i: int) -> None:
        plan = PLANS[i]
        if self.attempt(lambda: self.held.add(plan)) is not None:
            assert plan.name not in self.scales
            self.scales[plan.name] = 1.0

    @precondition(lambda self: self.scales)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.scales)))
        self.held.remove(name)
        del self.scales[name]
        self.slots = {key: slot for key, slot in self.slots.items() if name not in {plan for plan, _ in key}}

    @precondition(lambda self: self.scales)
    @rule(data=st.data(), scale=st.sampled_from([0.0, 0.5, -2.0, 1.0]))
    def rescale(self, data: st.DataObject, scale: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.scales)))
        self.held.set_scale(name, scale)
        self.scales[name] = scale

    @precondition(lambda self: self.scales)
    @rule(data=st.data())
    def combine(self, data: st.DataObject) -> None:
        known = [key for plan in self.held.plans for key in keys(plan)]
        key = frozenset(data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4)))
        slot = self.attempt(lambda: self.held.slot(key))
        if slot is not None:
            assert self.slots.setdefault(key, slot) == slot

    @invariant()
    def every_slot_does_what_a_fresh_program_does(self) -> None:
        fresh = program()
        for plan in self.held.plans:
            fresh.add(plan)
            fresh.set_scale(plan.name, self.scales[plan.name])
        assert len(set(self.slots.values())) == len(self.slots)
        for key, slot in self.slots.items():
            assert torch.equal(effect(self.held, slot), effect(fresh, fresh.slot(key)))

    @invariant()
    def free_slots_do_nothing_and_addresses_stay(self) -> None:
        for slot in set(range(4)) - set(self.slots.values()):
            assert all(int(self.held.tables(i).span[slot].abs().max()) == 0 for i in range(len(SITES)))
        assert addresses(self.held) == self.places
        spans = torch.stack([self.held.tables(i).span for i in range(len(SITES))])
        used = {e for first, count, _ in spans.reshape(-1, 3).tolist() for e in range(first, first + count)}
        assert used == set(range(self.held._entries.filled))
        assert self.held.entries_per_row == int(spans[..., 1].max())

    def teardown(self) -> None:
        for name in list(self.scales):
            self.held.remove(name)
        fresh = program(Capacity(slots=4, entries=14, rows=12))
        assert sorted(self.held._bank.free) == sorted(fresh._bank.free)
        assert sorted(self.held._free_slots) == sorted(fresh._free_slots)
        assert self.held._entries.filled == 0


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
