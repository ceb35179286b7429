from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import steerkern as sk
from steerkern.program import Program, Site
from steerkern.runtime.rows import Prompts, RowMap, Written
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


def test_each_row_and_phase_gets_the_slot_of_its_plans() -> None:
    made = program(plan("a"), plan("b", "decode"), plan("c", (-1,)))
    rows = RowMap(made)
    rows.assign([["a"], [], ["a", "b", "c"]])
    rows.begin(Prompts.of(3, 2, None))
    rows.advance(3, 2, 0)
    a, ac, ab = (made.slot([(n, 0) for n in names]) for names in ("a", "ac", "ab"))
    assert rows.slot[:6].tolist() == [a, a, -1, -1, a, ac]
    rows.advance(3, 1, 2)
    assert rows.slot[:3].tolist() == [a, -1, ab]
    assert len({a, ac, ab}) == 3


def test_a_forward_in_which_nobody_is_steered_has_no_pointer() -> None:
    rows = RowMap(program(plan("late", "decode")))
    rows.begin(Prompts.of(1, 3, None))
    rows.advance(1, 3, 0)
    assert rows.pointer == 0
    rows.advance(1, 1, 3)
    assert rows.pointer == rows.slot.data_ptr()


def test_steady_decode_reuses_the_map_and_still_counts() -> None:
    rows = RowMap(program(plan("a")))
    rows.begin(Prompts.of(2, 3, None))
    for past, tokens in [(0, 3), (3, 1), (4, 1), (5, 1)]:
        rows.advance(2, tokens, past)
    rows.flush()
    assert rows.written["a"].tokens == 12
    assert rows.written["a"].spans == {0: [[0, 5]], 1: [[0, 5]]}
    rows.flush()
    assert rows.written["a"].tokens == 12


def test_bounded_scopes_are_mapped_anew_at_every_step() -> None:
    rows = RowMap(program(plan("window", Tokens("all", start=4, stop=6))))
    rows.begin(Prompts.of(1, 3, None))
    steered = []
    for past, tokens in [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1)]:
        rows.advance(1, tokens, past)
        steered.append(rows.pointer != 0)
    assert steered == [False, False, True, True, False]


def test_beams_take_the_plans_of_their_prompt() -> None:
    made = program(plan("a"))
    rows = RowMap(made)
    rows.assign([["a"], []])
    rows.begin(Prompts.of(2, 2, None))
    rows.advance(6, 1, 2)
    assert (rows.slot[:6] >= 0).tolist() == [True] * 3 + [False] * 3


def test_a_batch_that_does_not_fit_the_request_raises() -> None:
    rows = RowMap(program(plan("a")))
    rows.begin(Prompts.of(2, 2, None))
    with pytest.raises(sk.PlanError, match="a forward of 3 sequences inside a request of 2 prompts"):
        rows.advance(3, 1, 2)


def test_more_rows_than_prompts_raises() -> None:
    rows = RowMap(program(plan("a")))
    rows.assign([["a"], ["a"], []])
    with pytest.raises(sk.PlanError, match="rows name 3 sequences, the batch has 2 prompts"):
        rows.begin(Prompts.of(2, 2, None))


def test_the_map_grows_with_the_batch() -> None:
    rows = RowMap(program(plan("a")), capacity=4)
    rows.begin(Prompts.of(5, 7, None))
    rows.advance(5, 7, 0)
    assert (rows.slot[:35] >= 0).all()


def test_more_than_sixty_plans_share_a_map() -> None:
    made = Program(SITES, WIDTH, capacity=sk.Capacity(slots=80, entries=1024, rows=80))
    for i in range(70):
        made.add(plan(f"p{i}"))
    rows = RowMap(made)
    rows.assign([[f"p{i}"] for i in range(70)])
    rows.begin(Prompts.of(70, 1, None))
    rows.advance(70, 1, 0)
    assert len(set(rows.slot[:70].tolist())) == 70
