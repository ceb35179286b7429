"""The specification in plain torch: any device, any float dtype, differentiable.

``project, map, lift, normalise`` with sums in fp32 (fp64 for fp64 rows) and one rounding to the row's dtype.
It is what every other backend is compared with, the fallback, and the path that gradients take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .schemas import MAX_ENTRIES, Field, Flag, Link, Mode, Norm, Tables


def edit_rows(
    h: Tensor, slot: Tensor, tables: Tables, entries: int | None = None, trace: Tensor | None = None
) -> Tensor:
    r"""Return ``h [N, H]`` edited by the program, as a new tensor.

    For a row with slot ``s`` and the entries ``e`` of that slot::

        a_e  = <h, v_e>
        d_e  = clamp(alpha_e - beta_e * a_e, lo_e - a_e, hi_e - a_e)     (alpha_e * |(a_e, a_mate)| - a_e in pair mode)
        h'   = h + sum_e gain_s * scale_e * d_e * v_e                    (entries whose gate is open)

    Rows with slot -1, and rows of which every coefficient is zero, keep their bits. ``entries`` bounds the
    entries per slot (default: the largest count in ``span``, which reads a device value). ``trace [N, T]`` receives
    the coordinates ``a_e`` of the first ``T`` entries.
    """
    bank, links, fields, span, gain = tables
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    if entries is None:
        entries = int(span[:, 1].max()) if span.numel() else 0
    if entries == 0 or h.shape[0] == 0:
        return h
    steered = slot >= 0
    s = slot.clamp(min=0).long()
    first, count, mode = span[s].unbind(-1)
    row = h.to(wide)
    index = torch.arange(entries, device=h.device)
    live = steered[:, None] & (index < count[:, None])  # [N, K]
    e = torch.where(live, first[:, None] + index, 0).long()
    link = links[:, e]  # [4, N, K]
    value = fields[:, e].to(wide)  # [7, N, K]
    flags = link[Link.FLAGS]
    vectors = [bank[link[Link.ROW][:, k].long()].to(wide) for k in range(entries)]  # K of [N, H]
    read = live & has(flags, Flag.READ)
    a = torch.stack([(row * v).sum(-1) for v in vectors], -1)
    a = torch.where(read, a, 0.0)  # [N, K]
    if trace is not None:
        columns = min(entries, trace.shape[1])
        trace[:, :columns] = torch.where(read[:, :columns], a[:, :columns].detach().float(), trace[:, :columns])

    mate = a.gather(1, link[Link.MATE].clamp(0, entries - 1).long())
    moved = value[Field.ALPHA] - value[Field.BETA] * a
    bounded = torch.minimum(torch.maximum(moved, value[Field.LO] - a), value[Field.HI] - a)
    radius = _root(a * a + mate * mate)
    d = torch.where(has(flags, Flag.PAIR), value[Field.ALPHA] * radius - a, bounded)

    norm = _root(row.square().sum(-1, keepdim=True))
    condition = a.gather(1, link[Link.GATE].clamp(0, entries - 1).long())
    cosine = torch.where(norm > 0, condition / torch.where(norm > 0, norm, 1.0), 0.0)
    condition = torch.where(has(flags, Flag.COSINE), cosine, condition)
    inside = (value[Field.GATE_LO] <= condition) & (condition <= value[Field.GATE_HI])
    acts = live & has(flags, Flag.WRITE) & ((link[Link.GATE] < 0) | inside)

    strength = torch.where(has(flags, Flag.GAINED), gain[s].to(wide)[:, None], 1.0) * value[Field.SCALE]
    coefficient = torch.where(acts, strength * d, 0.0)
    lift = torch.where(acts[:, :1], coefficient[:, :1] * vectors[0], 0.0)
    for k in range(1, entries):
        lift = lift + torch.where(acts[:, k : k + 1], coefficient[:, k : k + 1] * vectors[k], 0.0)
    edited = row + lift
    keep = has(mode, Mode.KEEP_NORM)[:, None]
    after = _root(edited.square().sum(-1, keepdim=True))
    ratio = torch.where(keep & (after > 0), norm / torch.where(after > 0, after, 1.0), 1.0)
    edited = torch.where(keep, edited * ratio, edited)
    changed = (coefficient != 0).any(-1, keepdim=True)
    return torch.where(changed, edited.to(h.dtype), h)


def _root(square: Tensor) -> Tensor:
    # sqrt has no derivative at 0, and inf * 0 would make NaN of the gradient of a row that is all zeros
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def has(bits: Tensor, flag: int) -> Tensor:
    """Elementwise test of one flag, as a bool tensor."""
    return bits.bitwise_and(int(flag)) != 0


def normalise(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: int) -> Tensor:
    """Normalise ``h [N, H]`` in one of the conventions of :class:`~steerkern.ops.schemas.Norm`.

    The order of operations is that of the Hugging Face modules, so in fp32 the result has their bits.
    """
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    row = h.to(wide)
    if norm == Norm.LAYER:
        scale = None if weight is None else weight.to(wide)
        shift = None if bias is None else bias.to(wide)
        return F.layer_norm(row, (h.shape[-1],), scale, shift, eps).to(h.dtype)
    unit = row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return unit.to(h.dtype)
    if norm == Norm.LLAMA:
        return weight * unit.to(h.dtype)
    if norm == Norm.GEMMA:
        return (unit * (1.0 + weight.to(wide))).to(h.dtype)
    return (weight.to(wide) * unit).to(h.dtype)


def steer(
    h: Tensor,
    slot: Tensor | None,
    tables: Tables,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    norm: int = Norm.NONE,
    delta: Tensor | None = None,
    trace: Tensor | None = None,
    entries: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Both ops without side effects: the edited rows and, unless ``norm`` is NONE, the normalised ones."""
    if delta is not None:
        h = h + delta
    if slot is not None:
        h = edit_rows(h, slot, tables, entries, trace)
    return h, None if norm == Norm.NONE else normalise(h, weight, bias, eps, norm)


def find_fault(slot: Tensor, tables: Tables) -> str | None:
    """Say what is wrong with the slots or the tables they reach, or None. Reads device values."""
    bank, links, _, span, _ = tables
    slots, (_, held) = span.shape[0], links.shape
    high = int(slot.max()) if slot.numel() else -1
    if high >= slots:
        return f"slot {high}: the program has {slots} slots (0..{slots - 1}, -1 for none)"
    for s in slot[slot >= 0].unique().tolist():
        first, count, _ = span[s].tolist()
        if not 0 <= count <= MAX_ENTRIES or first < 0 or first + count > held:
            return f"slot {s}: entries {first}..{first + count} lie outside the {held} held"
        row, mate, gate, flags = links[:, first : first + count]
        if count and (int(row.min()) < 0 or int(row.max()) >= bank.shape[0]):
            return f"slot {s}: a bank row lies outside 0..{bank.shape[0] - 1}"
        if count and (int(mate.max()) >= count or int(gate.max()) >= count):
            return f"slot {s}: a mate or gate lies outside its {count} entries"
        if bool((has(flags, Flag.PAIR) & (mate < 0)).any()):
            return f"slot {s}: a rotation entry has no mate"
    return None
