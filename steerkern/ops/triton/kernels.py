# mypy: ignore-errors
# The Triton language, not Python: loads where it is used, so that the package needs neither triton nor a GPU.
"""The Triton kernel: one program edits and normalises one row, which stays in its registers throughout.

The meaning is fixed by ``ops/reference.py``, the tables by ``ops/schemas.py``. Block shape and order of every sum
follow the width and dtype alone, so a row's bits do not depend on the batch.
"""

import triton
import triton.language as tl

READ = tl.constexpr(1)
WRITE = tl.constexpr(2)
PAIR = tl.constexpr(4)
COSINE = tl.constexpr(8)
GAINED = tl.constexpr(16)
KEEP_NORM = tl.constexpr(1)
LLAMA = tl.constexpr(1)
GEMMA = tl.constexpr(3)
LAYER = tl.constexpr(4)
MAX_ENTRIES = tl.constexpr(64)
LANES = tl.constexpr(32)
"""Entries held per tensor: 32 lie in one warp, so that taking one out of them needs no barrier."""


@triton.jit
def steer_rows(
    h, h_stride, slot, bank, links, fields, span, gain, rows, entries, slots,
    weight, bias, eps, y, delta, delta_stride, trace, columns,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``; ``slot``, ``weight``, ``bias``, ``y``, ``delta`` and ``trace`` may be None."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = h + n * h_stride + column
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        x = _round(x + tl.load(delta + n * delta_stride + column, mask=inside, other=0.0).to(tl.float32), h)
    changed = delta is not None
    if slot is not None:
        s = tl.load(slot + n).to(tl.int64)
        changed = tl.full([], delta is not None, tl.int1)
        if (s >= 0) & (s < slots):
            first = tl.load(span + 3 * s).to(tl.int64)
            count = tl.load(span + 3 * s + 1)
            keep = (tl.load(span + 3 * s + 2) & KEEP_NORM) != 0
            strength = tl.load(gain + s)
            if (count > 0) & (count <= MAX_ENTRIES) & (first >= 0) & (first + count <= entries):
                if count == 1:
                    x, moved = _edit_one(
                        x, h, bank, links + first, fields + first, rows, entries, keep, strength, trace, n * columns,
                        columns, column, WIDTH,
                    )  # fmt: skip
                else:
                    x, moved = _edit_many(
                        x, h, bank, links + first, fields + first, rows, entries, count, keep, strength, trace,
                        n * columns, columns, column, WIDTH,
                    )  # fmt: skip
                changed |= moved
    if changed:
        tl.store(place, x.to(h.dtype.element_ty), mask=inside)
    if y is not None:
        out = _normalise(x, weight, bias, eps, h, column, WIDTH, NORM)
        tl.store(y + n * WIDTH + column, out.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _round(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _edit_one(
    x, h, bank, links, fields, rows, entries, keep, gain, trace, at, columns, column, WIDTH: tl.constexpr
):  # fmt: skip
    """A slot of one entry: its direction is read once and stays in registers."""
    row, flags = _entry(links, 0, True, rows, entries)
    v = _direction(bank, row, flags != 0, column, WIDTH)
    a = tl.full([], 0.0, tl.float32)
    if (flags & READ) != 0:
        a = tl.sum(x * v, 0)
        if trace is not None:
            tl.store(trace + at, a, mask=columns > 0)
    norm = tl.full([], 0.0, tl.float32)
    if keep | ((flags & COSINE) != 0):
        norm = _length(x)
    gate = tl.load(links + 2 * entries)
    c = _coefficient(fields, entries, 0, True, flags, gate, a, a, a, gain, norm)
    moved = c != 0.0
    if moved:
        x = _lifted(x, c * v, keep, norm, h)
    return x, moved


@triton.jit
def _edit_many(
    x, h, bank, links, fields, rows, entries, count, keep, gain, trace, at, columns, column, WIDTH: tl.constexpr
):  # fmt: skip
    """A slot of up to 64 entries: all project, two at a time, before any lifts."""
    lane = tl.arange(0, LANES)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)  # entries 32 to 63
    for k in range(0, count, 2):
        row0, flags0 = _entry(links, k, True, rows, entries)
        row1, flags1 = _entry(links, k + 1, k + 1 < count, rows, entries)
        if ((flags0 | flags1) & READ) != 0:
            p0 = x * _direction(bank, row0, (flags0 & READ) != 0, column, WIDTH)
            p1 = x * _direction(bank, row1, (flags1 & READ) != 0, column, WIDTH)
            a0, a1 = tl.reduce((p0, p1), 0, add_pairs)
            a, b = _keep(a, b, k, a0, flags0, lane, trace, at, columns)
            a, b = _keep(a, b, k + 1, a1, flags1, lane, trace, at, columns)

    low, high = lane < count, lane + LANES < count
    _, flags_low = _entry(links, lane, low, rows, entries)
    _, flags_high = _entry(links, lane + LANES, high, rows, entries)
    norm = tl.full([], 0.0, tl.float32)
    if keep | (tl.max((flags_low | flags_high) & COSINE, 0) != 0):
        norm = _length(x)
    c = _coefficients(links, fields, entries, lane, low, flags_low, a, a, b, gain, norm)
    d = tl.zeros([LANES], tl.float32)
    if count > LANES:
        d = _coefficients(links, fields, entries, lane + LANES, high, flags_high, b, a, b, gain, norm)
    moved = tl.max(((c != 0.0) | (d != 0.0)).to(tl.int32), 0) != 0
    if moved:
        lift = tl.zeros_like(x)
        for k in range(0, count):
            lift = _add_term(lift, c, d, k, lane, bank, links, rows, column, WIDTH)
        x = _lifted(x, lift, keep, norm, h)
    return x, moved


@triton.jit
def add_pairs(a0, a1, b0, b1):
    """Two sums at once, so that their partial sums meet at one barrier."""
    return a0 + b0, a1 + b1


@triton.jit
def _entry(links, k, live, rows, entries):
    """Bank row and flags of entry ``k``; an entry whose row lies outside the bank does nothing."""
    row = tl.load(links + k, mask=live, other=-1)
    flags = tl.load(links + 3 * entries + k, mask=live, other=0)
    return row, tl.where((row >= 0) & (row < rows), flags, 0)


@triton.jit
def _direction(bank, row, wanted, column, WIDTH: tl.constexpr):
    return tl.load(bank + row.to(tl.int64) * WIDTH + column, mask=wanted & (column < WIDTH), other=0.0)


@triton.jit
def _keep(a, b, k, coordinate, flags, lane, trace, at, columns):
    """Put a coordinate into lane ``k`` of 64, and into the trace."""
    read = (flags & READ) != 0
    if trace is not None:
        tl.store(trace + at + k, coordinate, mask=read & (k < columns))
    coordinate = tl.where(read, coordinate, 0.0)
    return tl.where(lane == k, coordinate, a), tl.where(lane + LANES == k, coordinate, b)


@triton.jit
def _coefficients(links, fields, entries, k, live, flags, own, a, b, gain, norm):
    mate = tl.load(links + entries + k, mask=live, other=0)
    gate = tl.load(links + 2 * entries + k, mask=live, other=-1)
    condition = _pick(a, b, gate)
    other = _pick(a, b, mate)
    return _coefficient(fields, entries, k, live, flags, gate, own, condition, other, gain, norm)


@triton.jit
def _pick(a, b, index):
    index = tl.minimum(tl.maximum(index, 0), MAX_ENTRIES - 1)
    return tl.where(index < LANES, tl.gather(a, index % LANES, 0), tl.gather(b, index % LANES, 0))


@triton.jit
def _coefficient(fields, entries, k, live, flags, gate, a, condition, mate, gain, norm):
    """``gain * scale * (a' - a)``, or 0 where the entry does not write or its gate is shut."""
    alpha = tl.load(fields + k, mask=live, other=0.0)
    beta = tl.load(fields + entries + k, mask=live, other=0.0)
    lo = tl.load(fields + 2 * entries + k, mask=live, other=0.0)
    hi = tl.load(fields + 3 * entries + k, mask=live, other=0.0)
    scale = tl.load(fields + 4 * entries + k, mask=live, other=0.0)
    gate_lo = tl.load(fields + 5 * entries + k, mask=live, other=0.0)
    gate_hi = tl.load(fields + 6 * entries + k, mask=live, other=0.0)
    cosine = tl.where(norm > 0.0, tl.div_rn(condition, tl.where(norm > 0.0, norm, 1.0)), 0.0)
    condition = tl.where((flags & COSINE) != 0, cosine, condition)
    opened = (gate < 0) | ((gate_lo <= condition) & (condition <= gate_hi))
    d = alpha - beta * a
    d = tl.where(d < lo - a, lo - a, d)
    d = tl.where(d > hi - a, hi - a, d)
    radius = tl.sqrt_rn(a * a + mate * mate)
    d = tl.where((flags & PAIR) != 0, alpha * radius - a, d)
    strength = tl.where((flags & GAINED) != 0, gain * scale, scale)
    return tl.where(opened & ((flags & WRITE) != 0), strength * d, 0.0)


@triton.jit
def _add_term(lift, c, d, k, lane, bank, links, rows, column, WIDTH: tl.constexpr):
    """``lift + c_k * v_k``; ``v_k`` is not read where ``c_k`` is 0."""
    mine = tl.sum(tl.where(lane == k, c, tl.where(lane + LANES == k, d, 0.0)), 0)
    row = tl.load(links + k, mask=mine != 0.0, other=0)
    return lift + mine * _direction(bank, row, mine != 0.0, column, WIDTH)


@triton.jit
def _length(x):
    return tl.sqrt_rn(tl.sum(x * x, 0))


@triton.jit
def _lifted(x, lift, keep, norm, h):
    """The edited row, rescaled if its norm is to be kept, rounded once."""
    x = x + lift
    if keep:
        after = _length(x)
        x = x * tl.where(after > 0.0, tl.div_rn(norm, tl.where(after > 0.0, after, 1.0)), 1.0)
    return _round(x, h)


@triton.jit
def _normalise(x, weight, bias, eps, h, column, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """The rounded row normalised in fp32; its sum of squares is taken from it directly, see ``ops/triton``."""
    inside = column < WIDTH
    if NORM == LAYER:
        x = x - tl.div_rn(tl.sum(x, 0), WIDTH * 1.0)
        x = tl.where(inside, x, 0.0)
    # 1 / sqrt(square / W + eps), with a division and half an ulp less
    x = x * tl.sqrt_rn(tl.div_rn(WIDTH * 1.0, tl.sum(x * x, 0) + WIDTH * eps))
    if weight is not None:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if NORM == LLAMA:
            x = _round(x, h)
        if NORM == GEMMA:
            w = 1.0 + w
        x = w * x
    if bias is not None:
        x = x + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x
