"""Every edit, packed into tables and run by the specification, is the formula that its docstring says, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from steerkern import Direction, Directions, Edit, Fingerprint, Plan, ablate, add, cap, clamp, probe, rotate
from steerkern.edits import Gate, Rows
from steerkern.ops.reference import edit_rows
from steerkern.program import Program, Site

WIDTH = 7
LAYERS = 4
SITES = [Site(layer, name) for layer in range(LAYERS) for name in ("resid_pre", "resid_mid")]
SITES.append(Site(LAYERS - 1, "resid_post"))

# The bank holds unit vectors rounded to float32, 6e-8 relative; everything else here runs in float64.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}

generator = torch.Generator().manual_seed(0)
V = [torch.randn(WIDTH, generator=generator) * (i + 1) for i in range(5)]
C = torch.randn(WIDTH, generator=generator)
H = torch.randn(33, WIDTH, generator=generator, dtype=torch.float64) * 3
UNIT = [v.double() / v.double().norm() for v in V]


def steered(plan: Plan, layer: int = 0, site: str = "resid_pre", h: Tensor = H, trace: Tensor | None = None) -> Tensor:
    """The rows as the plan leaves them at one site."""
    program = Program(SITES, plan.width)
    program.add(plan)
    slot = program.slot((plan.name, i) for i in range(len(plan.steps)))
    tables = program.tables(program.sites.index(Site(layer, site)))
    return edit_rows(h, torch.full((len(h),), slot, dtype=torch.int32), tables, trace=trace)


def along(h: Tensor, unit: Tensor) -> Tensor:
    return torch.stack([sum(a * b for a, b in zip(row, unit, strict=True)) for row in h])


def lifted(change: Tensor, unit: Tensor) -> Tensor:
    return torch.stack([c * unit for c in change])


def basis(vectors: list[Tensor]) -> Tensor:
    """Orthonormal columns by QR, which knows nothing of Gram-Schmidt's order of operations."""
    return torch.linalg.qr(torch.stack([v.double() for v in vectors], 1)).Q


def turned(h: Tensor, first: Tensor, second: Tensor, degrees: float) -> Tensor:
    b1 = first.double() / first.double().norm()
    rest = second.double() - (second.double() @ b1) * b1
    b2 = rest / rest.norm()
    x, y = along(h, b1), along(h, b2)
    radius, angle = (x * x + y * y).sqrt(), math.radians(degrees)
    return lifted(radius * math.cos(angle) - x, b1) + lifted(radius * math.sin(angle) - y, b2)


def removed(h: Tensor, vectors: list[Tensor], amount: float = 1.0) -> Tensor:
    q = basis(vectors)
    return -amount * (h @ q) @ q.T


Change = Callable[[Tensor], Tensor]


def constant(change: Tensor) -> Change:
    return change.expand_as


# what each edit adds to a row, written by hand
CASES: dict[str, tuple[Edit, Change]] = {
    "add": (add(V[0], 0.7), constant(0.7 * V[0].double())),
    "add, default": (add(V[1]), constant(V[1].double())),
    "add, negative": (add(V[1], -2), constant(-2 * V[1].double())),
    "add a direction": (add(Direction(V[2], 3), 0.5), constant(0.5 * V[2].double())),
    "add several": (add([V[0], Direction(V[1], 1)], 0.5), constant(0.5 * (V[0] + V[1]).double())),
    "add a matrix": (add(torch.stack(V[:3]), 2.0), constant(2.0 * sum(v.double() for v in V[:3]))),
    "ablate": (ablate(V[0]), lambda h: -lifted(along(h, UNIT[0]), UNIT[0])),
    "ablate a direction": (ablate(Direction(V[0], 1)), lambda h: -lifted(along(h, UNIT[0]), UNIT[0])),
    "ablate rank 3": (ablate(V[:3]), lambda h: removed(h, V[:3])),
    "ablate a part": (ablate(V[0], 0.3), lambda h: -0.3 * lifted(along(h, UNIT[0]), UNIT[0])),
    "ablate a part of rank 2": (ablate(V[:2], 0.3), lambda h: removed(h, V[:2], 0.3)),
    "reflect": (ablate(V[0], 2.0), lambda h: -2 * lifted(along(h, UNIT[0]), UNIT[0])),
    "clamp": (clamp(V[0], 1.5), lambda h: lifted(1.5 - along(h, UNIT[0]), UNIT[0])),
    "clamp to 0": (clamp(V[0], 0.0), lambda h: lifted(-along(h, UNIT[0]), UNIT[0])),
    "cap both": (cap(V[0], -1, 0.5), lambda h: lifted(along(h, UNIT[0]).clamp(-1, 0.5) - along(h, UNIT[0]), UNIT[0])),
    "cap": (cap(V[0], hi=0.5), lambda h: lifted(along(h, UNIT[0]).clamp(max=0.5) - along(h, UNIT[0]), UNIT[0])),
    "floor": (cap(V[0], lo=0.5), lambda h: lifted(along(h, UNIT[0]).clamp(min=0.5) - along(h, UNIT[0]), UNIT[0])),
    "rotate": (rotate(V[0], V[1], 30), lambda h: turned(h, V[0], V[1], 30)),
    "rotate back": (rotate(V[0], V[1], -200), lambda h: turned(h, V[0], V[1], -200)),
    "probe": (probe([V[0], V[1]]), torch.zeros_like),
}
WRITING = [name for name in CASES if name != "probe"]


@pytest.mark.parametrize("name", CASES)
def test_an_edit_is_its_formula(name: str) -> None:
    edit, change = CASES[name]
    torch.testing.assert_close(steered(Plan(edit)), H + change(H), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_vector_of_any_dtype_or_stride_is_the_same_edit(name: str) -> None:
    edit, _ = CASES[name]
    rows = edit.rows[None]
    strided = torch.zeros(WIDTH, 2)
    strided[:, 0] = V[0]
    makers: dict[str, Callable[[Any], Edit]] = {"add": add, "ablate": ablate, "probe": probe}
    if edit.kind in makers:
        for same in (V[0].double(), strided[:, 0], V[0].clone().requires_grad_()):
            made, plain = makers[edit.kind](same), makers[edit.kind](V[0])
            assert torch.equal(made.rows[None].vectors, plain.rows[None].vectors)
            assert not made.rows[None].vectors.requires_grad
    assert rows.vectors.dtype == torch.float32


def test_changing_the_given_tensor_later_changes_no_edit() -> None:
    vector = V[0].clone()
    edits = [add(vector), ablate(vector), probe(vector), add(V[1]).when(vector, lo=0), add({1: vector})]
    direction = Direction(vector, 1)
    before = [steered(Plan(edit), layer=1) for edit in edits]
    vector.fill_(7)
    assert torch.equal(direction.raw, V[0])
    for edit, rows in zip(edits, before, strict=True):
        assert torch.equal(steered(Plan(edit), layer=1), rows)


def test_the_norms_are_those_of_the_vectors_as_given() -> None:
    for edit in (add(V[:3]), ablate(V[:3]), clamp(V[:3], 1.0), probe(V[:3])):
        assert edit.rows[None].norms == pytest.approx([float(v.double().norm()) for v in V[:3]])


def test_the_ablated_subspace_is_gone_and_said_to_be_orthonormalised() -> None:
    edit = ablate(V[:3])
    out = steered(Plan(edit))
    # 3 vectors of norm up to 20 times a residue of 1e-6 |h|
    assert float((out @ torch.stack(V[:3]).double().T).abs().max()) < 2e-4
    assert edit.orthonormalised
    assert "orthonormalised" in repr(Plan(edit))
    # control: one vector after the other leaves something of the first, since they are not orthogonal
    first = H - lifted(along(H, UNIT[0]), UNIT[0])
    second = first - lifted(along(first, UNIT[1]), UNIT[1])
    assert float((second @ UNIT[0]).abs().max()) > 0.05


def test_one_vector_is_not_said_to_be_orthonormalised() -> None:
    assert not ablate(V[0]).orthonormalised
    assert not add(V[:2]).orthonormalised
    assert "orthonormalised" not in repr(Plan(ablate(V[0])))


def test_nearly_parallel_vectors_still_make_an_orthonormal_basis() -> None:
    vectors = [V[0], V[0] + 1e-3 * V[1], V[2] * 1e6, V[3] * 1e-6]
    rows = ablate(vectors).rows[None].vectors.double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("degrees", [0, 45, 90, 180, 270, 359.5, -30, 720])
def test_a_rotation_keeps_norms_and_reaches_the_absolute_angle(degrees: float) -> None:
    out = steered(Plan(rotate(V[0], V[1], degrees)))
    torch.testing.assert_close(out.norm(dim=1), H.norm(dim=1), **TOLERANCE)
    b1 = UNIT[0]
    b2 = basis([V[0], V[1]])[:, 1]
    b2 = b2 * torch.sign(b2 @ V[1].double())
    angle = torch.atan2(out @ b2, out @ b1)
    wanted = math.radians(degrees)
    # rows arrive at all angles (control), and leave at one
    assert float(torch.atan2(H @ b2, H @ b1).std()) > 0.5
    torch.testing.assert_close(torch.cos(angle - wanted), torch.ones_like(angle), rtol=0, atol=1e-9)
    torch.testing.assert_close(out @ basis([V[0], V[1], V[2]])[:, 2], H @ basis([V[0], V[1], V[2]])[:, 2], **TOLERANCE)


def test_rows_inside_a_cap_keep_their_bits() -> None:
    h = H.float()
    out = steered(Plan(cap(V[0], -1, 1)), h=h)
    a = along(h.double(), UNIT[0])
    inside = (a > -0.999) & (a < 0.999)
    assert inside.any()
    assert (~inside).any()
    assert torch.equal(out[inside], h[inside])
    assert not torch.equal(out[~inside], h[~inside])


def test_a_probe_reads_the_coordinates_and_keeps_the_bits() -> None:
    trace = torch.full((len(H), 4), torch.nan)
    h = H.float()
    assert torch.equal(steered(Plan(probe(V[:3])), h=h, trace=trace), h)
    expected = torch.stack([along(H, u) for u in UNIT[:3]], 1).float()
    torch.testing.assert_close(trace[:, :3], expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 7 terms of size 10
    assert bool(trace[:, 3].isnan().all())


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("scale", [-1.5, 0.25, 2.0])
def test_multipliers_act_on_every_edit(name: str, scale: float) -> None:
    """steering-vectors: the multiplier is ignored by ablation."""
    edit, change = CASES[name]
    out = steered(Plan(edit, scale=scale))
    torch.testing.assert_close(out, H + scale * change(H), **TOLERANCE)
    assert float((out - steered(Plan(edit))).abs().max()) > 1e-3
    assert torch.equal(steered(Plan(edit).scaled(scale)), out)


@pytest.mark.parametrize("name", CASES)
def test_keep_norm_rescales_to_the_norm_of_arrival(name: str) -> None:
    edit, change = CASES[name]
    target = H + change(H)
    target = target * (H.norm(dim=1) / target.norm(dim=1))[:, None]
    torch.testing.assert_close(steered(Plan(edit, keep_norm=True)), target, **TOLERANCE)


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 1.0), (0.5, math.inf), (-math.inf, -0.5)])
@pytest.mark.parametrize("name", WRITING)
def test_a_gate_reads_the_coordinate_of_the_row_as_it_arrived(name: str, lo: float, hi: float) -> None:
    edit, change = CASES[name]
    a = along(H, C.double() / C.double().norm())
    opened = ((a >= lo) & (a <= hi))[:, None]
    assert opened.any()
    assert not opened.all()
    out = steered(Plan(edit.when(C, lo, hi)))
    torch.testing.assert_close(out, torch.where(opened, H + change(H), H), **TOLERANCE)
    assert torch.equal(out[~opened[:, 0]], H[~opened[:, 0]])


@pytest.mark.parametrize("name", WRITING)
def test_a_cosine_gate_does_not_see_the_length_of_the_row(name: str) -> None:
    edit, change = CASES[name]
    gated = Plan(edit.when(C, lo=0.2, cosine=True))
    for size in (1.0, 1e-2, 1e3):
        h = H * size
        cosine = along(h, C.double() / C.double().norm()) / h.norm(dim=1)
        opened = (cosine >= 0.2)[:, None]
        assert opened.any()
        assert not opened.all()
        torch.testing.assert_close(
            steered(gated, h=h), torch.where(opened, h + change(h), h), rtol=2e-6, atol=2e-6 * max(size, 1.0)
        )
    # control: the coordinate does see it
    by_coordinate = Plan(edit.when(C, lo=0.2))
    small, large = (steered(by_coordinate, h=H * size) / size - H for size in (1e-2, 1e3))
    assert not torch.equal(small == 0, large == 0)


def test_a_gate_of_a_direction_is_the_gate_of_its_unit() -> None:
    for condition in (C, C * 100, Direction(C * 3, 2)):
        gate = add(V[0]).when(condition, lo=1).gate
        assert gate is not None
        torch.testing.assert_close(gate.unit.double(), C.double() / C.double().norm(), rtol=0, atol=1e-7)


def test_edits_that_meet_act_simultaneously() -> None:
    """Each reads the row as it arrived: the sum of the changes, however the edits came together."""
    for first, second in itertools.combinations_with_replacement(CASES, 2):
        (one, change), (two, other) = CASES[first], CASES[second]
        together = steered(Plan([one, two]))
        assert torch.allclose(together, H + change(H) + other(H), **TOLERANCE), f"{first} with {second}"
        composed = steered(Plan(one, name="a") + Plan(two, name="b"))
        assert torch.equal(composed, together), f"{first} + {second}"
    # control: a clamp that reads the row after an add leaves something else
    added = H + CASES["add"][1](H)
    in_turn = added + CASES["clamp"][1](added)
    assert float((in_turn - steered(Plan([CASES["add"][0], CASES["clamp"][0]]))).abs().max()) > 0.05


PER_LAYER = {layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)) + layer for layer in range(1, 4)}
SOURCES: dict[str, Any] = {
    "mapping": PER_LAYER,
    "mapping of directions": {layer: Direction(v, layer) for layer, v in PER_LAYER.items()},
    "Directions": Directions.of(PER_LAYER),
    "mapping of several": {layer: [v] for layer, v in PER_LAYER.items()},
    "mapping of matrices": {layer: v[None] for layer, v in PER_LAYER.items()},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("maker", [add, ablate, lambda s: clamp(s, 2.0), lambda s: cap(s, hi=0.1), probe])
def test_every_layer_gets_its_own_vector(source: str, maker: Callable[[Any], Edit]) -> None:
    """lm-eval hf_steered: a closure in the loop gives every hook point the last row's vector."""
    plan = Plan(maker(SOURCES[source]))
    for layer, vector in PER_LAYER.items():
        alone = steered(Plan(maker(vector)), layer=layer)
        assert torch.equal(steered(plan, layer=layer), alone)
    assert torch.equal(steered(plan, layer=0), H)  # no vector there
    if maker is not probe:  # control: the vectors make a difference
        last = steered(Plan(maker(PER_LAYER[3])), layer=1)
        assert float((steered(plan, layer=1) - last).abs().max()) > 1e-2


def test_several_vectors_per_layer_are_one_subspace_per_layer() -> None:
    stacks = {1: torch.stack(V[:2]), 3: torch.stack(V[2:4])}
    plan = Plan(ablate(stacks))
    for layer, vectors in ((1, V[:2]), (3, V[2:4])):
        torch.testing.assert_close(steered(plan, layer=layer), H + removed(H, vectors), **TOLERANCE)
    edit = plan.steps[0].edits[0]
    assert edit.orthonormalised
    assert (edit.rank, edit.layers) == (2, (1, 3))


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=6),
    scale=st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3),
    keep=st.booleans(),
    gated=st.booleans(),
)
def test_any_mixture_is_the_sum_of_its_formulas(names: list[str], scale: float, keep: bool, gated: bool) -> None:
    opened = torch.ones(len(H), 1, dtype=torch.bool)
    if gated:
        opened = (along(H, C.double() / C.double().norm()) >= 0.3)[:, None]
    edits = [CASES[name][0].when(C, lo=0.3) if gated else CASES[name][0] for name in names]
    expected = H + scale * sum(torch.where(opened, CASES[name][1](H), 0.0) for name in names)
    if keep:
        expected = expected * (H.norm(dim=1) / expected.norm(dim=1))[:, None]
    out = steered(Plan(edits, scale=scale, keep_norm=keep))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)  # up to 6 * 3 changes of size 100 times 6e-8


NAN, INF = math.nan, math.inf


def maps(vectors: Tensor, **numbers: tuple[float, ...]) -> dict[int | None, Rows]:
    """Rows whose map is the identity but for ``numbers``."""
    k = len(vectors)
    identity = {"norms": (1.0,) * k, "alpha": (0.0,) * k, "beta": (0.0,) * k, "lo": (-INF,) * k, "hi": (INF,) * k}
    return {None: Rows(vectors, **{**identity, **numbers})}


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "NaN": (lambda: add(torch.tensor([1.0, NAN])), ValueError, "add: vector holds NaN or Inf"),
    "Inf": (lambda: ablate(torch.tensor([1.0, INF])), ValueError, "ablate: vector holds NaN or Inf"),
    "fp64 beyond float32": (lambda: add(torch.tensor([1e300, 1.0]).double()), ValueError, "NaN or Inf"),
    "zero": (lambda: clamp(torch.zeros(3), 1.0), ValueError, "clamp: vector has norm 0"),
    "zero at a layer": (lambda: probe({2: torch.zeros(3)}), ValueError, "probe at layer 2: vector has norm 0"),
    "whole numbers": (lambda: add(torch.tensor([1, 2])), ValueError, r"float vector \[H\], got torch.int64 \[2\]"),
    "empty": (lambda: add(torch.zeros(0)), ValueError, r"got torch.float32 \[0\]"),
    "no vector": (lambda: ablate([]), ValueError, "vectors must be 1 to 64, got 0"),
    "no row": (lambda: ablate(torch.zeros(0, 3)), ValueError, "1 to 64, got 0"),
    "three dimensions": (lambda: add(torch.ones(1, 2, 3)), ValueError, r"\[1, 2, 3\]"),
    "scalar": (lambda: add(torch.tensor(1.0)), ValueError, r"float vector \[H\]"),
    "65 vectors": (lambda: add(torch.ones(65, 3)), ValueError, "1 to 64, got 65"),
    "a list of numbers": (lambda: add([1.0, 2.0]), TypeError, "vector must be a tensor, got float"),
    "a string": (lambda: ablate("refusal"), TypeError, "tensors, Directions or a mapping of layers, got str"),
    "None": (lambda: probe(None), TypeError, "got NoneType"),
    "a mapping to None": (lambda: probe({1: None}), TypeError, "probe at layer 1 takes tensors"),
    "an empty mapping": (lambda: add({}), ValueError, "got an empty mapping"),
    "layer -1": (lambda: add({-1: V[0]}), ValueError, "layer must be a whole number from 0, got -1"),
    "layer '1'": (lambda: add({"1": V[0]}), ValueError, "got '1'"),
    "layer True": (lambda: add({True: V[0]}), ValueError, "got True"),
    "two widths": (lambda: add([torch.ones(3), torch.ones(4)]), ValueError, r"one width, got \[3, 4\]"),
    "two widths in layers": (lambda: add({0: torch.ones(3), 1: torch.ones(4)}), ValueError, "one shape at every layer"),
    "two ranks in layers": (lambda: ablate({0: V[:1], 1: V[:2]}), ValueError, "one shape at every layer"),
    "dependent": (lambda: ablate([V[0], V[1], V[0] - V[1]]), ValueError, "vector 2 lies in the span"),
    "more than H": (lambda: ablate(torch.eye(3).repeat(2, 1)), ValueError, "vector 3 lies in the span"),
    "no plane": (lambda: rotate(V[0], -2 * V[0], 30), ValueError, "rotate: vector 1 lies in the span"),
    "plane of Directions": (lambda: rotate(Directions.of({1: V[0]}), V[1], 3), TypeError, "must be a tensor, got Dir"),
    "coefficient 0": (lambda: add(V[0], 0), ValueError, "coefficient must be finite and not 0 in float32, got 0.0"),
    "coefficient 1e-60": (lambda: add(V[0], 1e-60), ValueError, "got 1e-60"),
    "coefficient 1e39": (lambda: add(V[0], 1e39), ValueError, r"got 1e\+39"),
    "coefficient 10**400": (lambda: add(V[0], 10**400), ValueError, "coefficient must be finite"),
    "coefficient NaN": (lambda: add(V[0], NAN), ValueError, "coefficient must be finite"),
    "coefficient '1'": (lambda: add(V[0], "1"), TypeError, "coefficient must be a number, got '1'"),
    "coefficient tensor": (lambda: add(V[0], V[0]), TypeError, "coefficient must be a number"),
    "amount 0": (lambda: ablate(V[0], 0.0), ValueError, "amount must be finite and not 0"),
    "target inf": (lambda: clamp(V[0], INF), ValueError, "target must be finite in float32, got inf"),
    "degrees NaN": (lambda: rotate(V[0], V[1], NAN), ValueError, "degrees must be finite"),
    "cap nothing": (lambda: cap(V[0]), ValueError, "bounds nothing"),
    "cap empty": (lambda: cap(V[0], 2, 1), ValueError, r"cap needs lo <= hi, got \[2.0, 1.0\]"),
    "cap NaN": (lambda: cap(V[0], NAN), ValueError, "lo of cap must be finite in float32, got nan"),
    "cap up to inf": (lambda: cap(V[0], lo=INF), ValueError, "lo of cap must be finite in float32, got inf"),
    "cap down to -inf": (lambda: cap(V[0], hi=-INF), ValueError, "hi of cap must be finite"),
    "cap beyond float32": (lambda: cap(V[0], lo=1e300), ValueError, "lo of cap"),
    "gate nothing": (lambda: add(V[0]).when(C), ValueError, "gate needs lo or hi"),
    "gate empty": (lambda: add(V[0]).when(C, 2, 1), ValueError, "gate needs lo <= hi"),
    "gate NaN": (lambda: add(V[0]).when(C, NAN), ValueError, "lo of gate must be finite"),
    "gate from inf": (lambda: add(V[0]).when(C, INF), ValueError, "lo of gate must be finite"),
    "gate width": (lambda: add(V[0]).when(torch.ones(3), 0), ValueError, "gate has width 3, the edit has 7"),
    "gate zero": (lambda: add(V[0]).when(torch.zeros(7), 0), ValueError, "gate direction has norm 0"),
    "gate of no tensor": (lambda: add(V[0]).when("c", 0), TypeError, "gate direction must be a tensor, got str"),
    "cosine never": (lambda: add(V[0]).when(C, 1.5, cosine=True), ValueError, "never opens"),
    "cosine always": (lambda: add(V[0]).when(C, -1, 1, cosine=True), ValueError, "never closes"),
    "two gates": (lambda: add(V[0]).when(C, 0).when(V[1], 0), ValueError, "add has a gate already"),
    "unknown kind": (lambda: Edit("warp", add(V[0]).rows), ValueError, "kind must be one of add, ablate"),
    "no rows": (lambda: Edit("add", {}), ValueError, "one set of vectors"),
    "not unit": (lambda: Edit("probe", maps(V[0][None])), ValueError, "vectors must have norm 1"),
    "not orthogonal": (lambda: Edit("ablate", probe(V[:2]).rows), ValueError, "ablate needs orthogonal vectors"),
    "another kind's map": (lambda: Edit("ablate", clamp(V[0], 1).rows), ValueError, "ablate needs alpha 0.0, got"),
    "one axis": (lambda: Edit("rotate", probe(V[0]).rows), ValueError, "rotate needs two vectors, got 1"),
    "no angle": (lambda: Edit("rotate", maps(torch.eye(WIDTH)[:2])), ValueError, "cosine and sine"),
    "short map": (lambda: maps(torch.eye(WIDTH)[:2], alpha=(0.0,)), ValueError, "2 vectors need 2 alpha, got 1"),
    "NaN in a map": (lambda: maps(torch.eye(WIDTH)[:1], beta=(NAN,)), ValueError, "beta must be finite"),
    "norm 0": (lambda: maps(torch.eye(WIDTH)[:1], norms=(0.0,)), ValueError, "norms must be finite and not 0"),
    "gate not unit": (lambda: Gate(C * 2, 0.0, 1.0, False), ValueError, "gate direction must have norm 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


FREE = {"add": "alpha", "ablate": "beta", "clamp": "alpha", "cap": "lo hi", "rotate": "alpha", "probe": ""}


@pytest.mark.parametrize("kind", FREE)
def test_a_kind_has_no_map_but_its_own(kind: str) -> None:
    """A file may pair any kind with any numbers; an add with bounds would be run as a plain add."""
    made = {edit.kind: edit for edit, _ in CASES.values()}[kind]
    for name, value in {"alpha": 0.6, "beta": 0.5, "lo": -9.0, "hi": 9.0}.items():
        if name not in FREE[kind].split():
            rows = replace(made.rows[None], **{name: (value,) * made.rank})
            with pytest.raises(ValueError, match=f"^{kind} needs {name} "):
                replace(made, rows={None: rows})


def test_vectors_of_two_models_are_refused() -> None:
    a, b = Fingerprint("llama", WIDTH, 4), Fingerprint("qwen2", WIDTH, 4)
    one, two = Direction(V[0], 1, model=a), Direction(V[1], 1, model=b)
    for call in (lambda: add([one, two]), lambda: rotate(one, two, 10), lambda: add(one).when(two, lo=0)):
        with pytest.raises(ValueError, match=r"different models: llama .*, qwen2"):
            call()
    assert add([one, V[1]]).model == a
    assert add(V[0]).when(two, lo=0).model == b
    assert add(Directions.of({1: V[0]}, model=a)).model == a
    with pytest.raises(ValueError, match="width 7, the model is llama"):
        Edit("add", add(V[0]).rows, model=Fingerprint("llama", 8, 4))
