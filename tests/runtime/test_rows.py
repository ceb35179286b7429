from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import steerkern as sk
from steerkern.program import Program, Site
from steerkern.runtime.batch import Batch
from steerkern.runtime.prompts import Prompts
from steerkern.runtime.rows import Part, RowMap, Written
from steerkern.steps import Tokens

WIDTH = 8
SITES = [Site(0, "resid_pre"), Site(1, "resid_pre")]


def prompts() -> Prompts:
    # left padded, full, right padded
    return Prompts.of(3, 5, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))


def test_prompts_are_read_from_the_mask() -> None:
    p = prompts()
    assert p.start.tolist() == [2, 0, 0]
    assert p.stop.tolist() == [5, 5, 3]
    assert p.length == 5


def test_a_row_without_a_token_raises() -> None:
    with pytest.raises(sk.PlanError, match="row 1: the attention mask has no token"):
        Prompts.of(2, 2, torch.tensor([[1, 1], [0, 0]]))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (Tokens("prompt"), ["0011100", "1111100", "1110000"]),
        (Tokens("decode"), ["0000011", "0000011", "0000011"]),
        (Tokens("all"), ["0011111", "1111111", "1110011"]),
        (Tokens("prompt", (-1,)), ["0000100", "0000100", "0010000"]),
        (Tokens("prompt", (0, -2)), ["0011000", "1001000", "1100000"]),
        (Tokens("all", start=2), ["0000111", "0011111", "0010011"]),
        (Tokens("all", start=1, stop=4), ["0001110", "0111000", "0110010"]),
        (Tokens("decode", start=4), ["0000001", "0000011", "0000001"]),
    ],
)
def test_tokens_select_by_position_in_the_unpadded_sequence(tokens: Tokens, expected: list[str]) -> None:
    mask = prompts().select(tokens, np.arange(7))
    assert ["".join("01"[int(x)] for x in row) for row in mask] == expected


SOME = [Tokens("all", start=2), Tokens("prompt"), Tokens("decode", stop=6)]


@given(cut=st.integers(0, 7), tokens=st.sampled_from(SOME))
def test_chunks_select_the_same_tokens_as_one_forward(cut: int, tokens: Tokens) -> None:
    p = prompts()
    whole = p.select(tokens, np.arange(7))
    parts = [p.select(tokens, np.arange(cut)), p.select(tokens, np.arange(cut, 7))]
    assert np.array_equal(np.concatenate(parts, 1), whole)


def test_a_position_that_a_prompt_lacks_raises() -> None:
    with pytest.raises(sk.PlanError, match=r"position -4: the prompt of row 0 has 3 tokens"):
        prompts().select(Tokens("prompt", (-4,)), np.arange(5))


def test_written_counts_a_recomputed_token_once() -> None:
    written = Written()
    written.note(0, 2, 4)
    written.note(0, 2, 5)
    written.note(0, 9, 9)
    written.note(0, 2, 9)
    assert written.tokens == 5
    assert written.spans == {0: [[2, 5], [9, 9]]}


def program(*plans: sk.Plan) -> Program:
    made = Program(SITES, WIDTH)
    for plan in plans:
        made.add(plan)
    return made


def plan(name: str, scope: object = "all") -> sk.Plan:
    return sk.Plan(sk.add(torch.randn(WIDTH)), scope=scope, name=name)


class Rows:
    """A row map and the batch that it serves."""

    def __init__(self, made: Program, prompts: Prompts, plans: list[list[str]] | None = None, **options: int) -> None:
        self.map = RowMap(made, **options)
        self.batch = Batch(made, prompts, None if plans is None else [tuple(names) for names in plans])

    def advance(self, rows: int, tokens: int, past: int) -> list[int]:
        self.map.advance([Part(self.batch, rows, past, tokens)])
        return self.map.slot[: rows * tokens].tolist()


def test_each_row_and_phase_gets_the_slot_of_its_plans() -> None:
    made = program(plan("a"), plan("b", "decode"), plan("c", (-1,)))
    rows = Rows(made, Prompts.of(3, 2, None), [["a"], [], ["a", "b", "c"]])
    found = rows.advance(3, 2, 0)
    a, ac, ab = (made.slot([(n, 0) for n in names]) for names in ("a", "ac", "ab"))
    assert found == [a, a, -1, -1, a, ac]
    assert rows.advance(3, 1, 2) == [a, -1, ab]
    assert len({a, ac, ab}) == 3


def test_a_forward_in_which_nobody_is_steered_has_no_pointer() -> None:
    rows = Rows(program(plan("late", "decode")), Prompts.of(1, 3, None))
    rows.advance(1, 3, 0)
    assert rows.map.pointer == 0
    rows.advance(1, 1, 3)
    assert rows.map.pointer == rows.map.slot.data_ptr()


def test_steady_decode_reuses_the_map_and_still_counts() -> None:
    rows = Rows(program(plan("a")), Prompts.of(2, 3, None))
    for past, tokens in [(0, 3), (3, 1), (4, 1), (5, 1)]:
        rows.advance(2, tokens, past)
    rows.map.flush()
    assert rows.map.written["a"].tokens == 12
    assert rows.map.written["a"].spans == {0: [[0, 5]], 1: [[0, 5]]}
    rows.map.flush()
    assert rows.map.written["a"].tokens == 12


def test_bounded_scopes_are_mapped_anew_at_every_step() -> None:
    rows = Rows(program(plan("window", Tokens("all", start=4, stop=6))), Prompts.of(1, 3, None))
    steered = []
    for past, tokens in [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1)]:
        rows.advance(1, tokens, past)
        steered.append(rows.map.pointer != 0)
    assert steered == [False, False, True, True, False]


def test_beams_take_the_plans_of_their_prompt() -> None:
    rows = Rows(program(plan("a")), Prompts.of(2, 2, None), [["a"], []])
    assert [slot >= 0 for slot in rows.advance(6, 1, 2)] == [True] * 3 + [False] * 3


def test_a_batch_that_does_not_fit_the_request_raises() -> None:
    rows = Rows(program(plan("a")), Prompts.of(2, 2, None))
    with pytest.raises(sk.PlanError, match="a forward of 3 sequences inside a request of 2 prompts"):
        rows.advance(3, 1, 2)


def test_more_rows_than_prompts_raises() -> None:
    with pytest.raises(sk.PlanError, match="rows name 3 sequences, the batch has 2 prompts"):
        Batch(program(plan("a")), Prompts.of(2, 2, None), [("a",), ("a",), ()])


def test_the_map_grows_with_the_batch() -> None:
    rows = Rows(program(plan("a")), Prompts.of(5, 7, None), capacity=4)
    assert min(rows.advance(5, 7, 0)) >= 0


def test_more_than_sixty_plans_share_a_map() -> None:
    made = Program(SITES, WIDTH, capacity=sk.Capacity(slots=80, entries=1024, rows=80))
    for i in range(70):
        made.add(plan(f"p{i}"))
    rows = Rows(made, Prompts.of(70, 1, None), [[f"p{i}"] for i in range(70)])
    assert len(set(rows.advance(70, 1, 0))) == 70


def test_batches_of_one_forward_stand_one_after_the_other() -> None:
    made = program(plan("a"), plan("b", "decode"))
    one = Batch(made, Prompts.of(1, 3, None), [("a",)])
    two = Batch(made, Prompts.of(1, 2, None), [("a", "b")])
    rows = RowMap(made)
    rows.advance([Part(one, 1, 0, 3), Part(two, 1, 2, 1)])
    a, ab = made.slot([("a", 0)]), made.slot([("a", 0), ("b", 0)])
    assert rows.slot[:4].tolist() == [a, a, a, ab]
    for step in range(3):
        rows.advance([Part(one, 1, 3 + step, 1), Part(two, 1, 3 + step, 1)])
        assert rows.slot[:2].tolist() == [a, ab]
    rows.flush()
    assert rows.written["a"].spans == {0: [[0, 5]], 1: [[2, 5]]}
    assert rows.written["b"].spans == {1: [[2, 5]]}


def test_a_slot_that_went_to_another_is_not_taken_for_the_old_one() -> None:
    """Two requests alternate in a table with one slot: each must be mapped anew, and a stale lease must show."""
    made = Program(SITES, WIDTH, capacity=sk.Capacity(slots=1, entries=8, rows=4))
    made.add(plan("a"))
    made.add(plan("b"))
    batches = [Batch(made, Prompts.of(1, 1, None), [(name,)]) for name in "ab"]
    rows = RowMap(made)
    stale = made.lease([("b", 0)])
    for step in range(1, 4):
        for name, batch in zip("ab", batches, strict=True):
            rows.advance([Part(batch, 1, step, 1)])
            lease = made.lease([(name, 0)])
            assert rows.slot[0] == lease.slot
            row = made.tables(0).links[0, made.tables(0).span[lease.slot, 0]]
            assert torch.equal(made.tables(0).bank[row], made.get(name).plan.steps[0].edits[0].rows[None].vectors[0])
            assert made.keeps(lease)
            assert not made.keeps(stale)
            stale = lease
    with pytest.raises(sk.PlanError, match="need a slot, all 1 are taken"):
        rows.advance([Part(batch, 1, 4, 1) for batch in batches])
