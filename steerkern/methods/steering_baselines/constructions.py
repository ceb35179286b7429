"""Published ways to make a plan, each a constructor: to compare methods, change one word.

Every one takes the :class:`~steerkern.subject.Subject` and two sets of prompts or texts, and returns plans whose
strength is the published one; ``plan.scaled(-1)`` steers the other way where the method adds. Where a method writes at
a site of its own, what is written here is said in the docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...directions import Direction
from ...edits import ablate, add, clamp, rotate
from ...extraction import Rendered, capture, states
from ...plan import Plan
from ...runtime import heads
from ...steps import Tokens
from ...subject import Asked, Subject


def ablation(direction: Tensor | Direction, *, mid: bool = True, name: str = "ablation") -> Plan:
    """Directional ablation (arXiv 2406.11717): nothing along the direction is left anywhere in the residual stream.

    The paper projects out the embedding and what each branch adds; the stream itself is projected here, before the
    first block, in the middle of each and after it, which is the same. Models whose branches run side by side have no
    ``resid_mid``: ``mid=False``.
    """
    edit = ablate(direction)
    ends = Plan(edit, layers=0, site="resid_pre", name=name) + Plan(edit, site="resid_post", name=name)
    return ends + Plan(edit, site="resid_mid", name=name) if mid else ends


def addition(direction: Tensor | Direction, layer: int, coefficient: float = 1.0, *, name: str = "addition") -> Plan:
    """``+ c r`` at ``resid_pre`` of the layer that ``r`` is from, raw, on every token (arXiv 2406.11717)."""
    return Plan(add(direction, coefficient), layers=layer, name=name)


def affine(direction: Tensor | Direction, mean: Tensor, *, name: str = "affine") -> Plan:
    """``h - r r^T (h - mean)``: the coordinate is set to that of a reference mean, at every layer."""
    raw = direction.raw if isinstance(direction, Direction) else direction
    unit = raw.float() / raw.float().norm()
    return Plan(clamp(unit, float(mean.float() @ unit)), name=name)


def caa(
    subject: Subject,
    positive: Sequence[Rendered],
    negative: Sequence[Rendered],
    layer: int,
    coefficient: float = 1.0,
    *,
    offset: int = -1,
    name: str = "caa",
) -> Plan:
    """Contrastive Activation Addition (arXiv 2312.06681): mean of paired differences at the answer token.

    Args:
        subject: the model.
        positive: prompts that end in the answer that shows the behaviour, as the model reads them.
        negative: the same prompts with the other answer.
        layer: of ``resid_post``, read and written.
        coefficient: times the raw mean difference.
        offset: first written position, from the prompt's end; the paper writes from the end of the instruction on.
        name: of the plan.

    Raises:
        ValueError: sides of different length.
    """
    if len(positive) != len(negative):
        raise ValueError(f"pairs need two sides of one length, got {len(positive)} and {len(negative)}")
    difference = _site(subject, positive, layer + 1, -1) - _site(subject, negative, layer + 1, -1)
    scope = Tokens(start=offset)
    return Plan(add(difference.mean(0), coefficient), layers=layer, site="resid_post", scope=scope, name=name)


def actadd(
    subject: Subject, positive: str, negative: str, layer: int, coefficient: float = 1.0, *, name: str = "actadd"
) -> Plan:
    """ActAdd (arXiv 2308.10248) with one pair of texts, read at their last token and added from the first token on.

    The paper adds the difference token by token at the front of the prompt; this is the form that later work uses.
    """
    sides = subject.render([positive, negative])
    states_of = _site(subject, sides, layer, -1)
    return Plan(add(states_of[0] - states_of[1], coefficient), layers=layer, name=name)


def repe(
    subject: Subject,
    positive: Sequence[Asked],
    negative: Sequence[Asked],
    coefficient: float = 1.0,
    *,
    piecewise: bool = False,
    keep_norm: bool = False,
    name: str = "repe",
) -> Plan:
    """RepE (arXiv 2310.01405): per layer the first principal component of recentred differences at the last token.

    Signs are such that positives project higher; vectors are of unit norm. ``h + c v``, or with ``piecewise``
    ``h + c sign(h v) v``; ``keep_norm`` restores ``|h|``.
    """
    sides = [subject.render(side) for side in (positive, negative)]
    count = min(map(len, sides))
    read = [_all(subject, side[:count]) for side in sides]
    vectors = {}
    for layer in range(1, subject.depth):
        vectors[layer] = component(read[0][:, layer], read[1][:, layer])
    if not piecewise:
        return Plan(add(vectors, coefficient), layers=list(vectors), keep_norm=keep_norm, name=name)
    whole: Plan | None = None
    for layer, vector in vectors.items():
        up = add(vector, coefficient).when(vector, lo=0.0)
        down = add(vector, -coefficient).when(vector, hi=-torch.finfo(torch.float32).tiny)
        one = Plan([up, down], layers=layer, keep_norm=keep_norm, name=name)
        whole = one if whole is None else whole + one
    assert whole is not None
    return whole


def component(positive: Tensor, negative: Tensor) -> Tensor:
    """PCA-1 ``[H]`` of paired, recentred differences of states ``[N, H]``, unit norm, positives higher."""
    differences = positive.double() - negative.double()
    # each pair counts with both signs, so that their mean is no component of its own
    both = torch.cat([differences, -differences])
    _, _, v = torch.linalg.svd(both - both.mean(0), full_matrices=False)
    first: Tensor = v[0]
    return first.float() * torch.sign((differences @ first).mean()).float()


def iti(
    subject: Subject,
    positive: Sequence[Asked],
    negative: Sequence[Asked],
    strength: float = 15.0,
    *,
    count: int | None = None,
    name: str = "iti",
) -> Plan:
    """Inference-Time Intervention (arXiv 2306.03341): the best heads are moved along their own mean difference.

    ``head_z[l, h] += strength * sigma * theta`` at the input of ``o_proj`` adds ``W_O[:, h] (strength sigma theta)`` to
    the residual stream: a constant vector per layer, which this plan writes at ``resid_mid``, on the last prompt token
    and all after it. Heads are ranked by how well a probe along ``theta`` tells the held-out half of the prompts; by
    default one in twenty is moved, as the paper's 48 of 1024.

    Raises:
        PlanError: a family whose head site is not found.
    """
    sites = heads.find(subject.model)
    up, down = (_head_states(subject, side, sites) for side in (positive, negative))
    found = []
    for layer in sites:
        a, b = up[layer].double(), down[layer].double()
        for head in range(a.shape[1]):
            found.append((*_head(a[:, head], b[:, head]), layer, head))
    best = sorted(found, key=lambda entry: (-entry[0], *entry[2:]))[: count or max(1, len(found) // 20)]
    shifts: dict[int, Tensor] = {}
    for _, move, layer, head in best:
        z = torch.zeros(1, sites[layer].heads, sites[layer].size)
        z[0, head] = strength * move
        added = heads.contributions(sites[layer], z.to(subject.model.device, subject.model.dtype))[0, head].detach()
        shifts[layer] = shifts.get(layer, torch.zeros(subject.width)) + added.float().cpu()
    return Plan(add(shifts), layers=sorted(shifts), site="resid_mid", scope="reply", name=name)


def _head_states(subject: Subject, side: Sequence[Asked], sites: dict[int, heads.HeadSite]) -> dict[int, Tensor]:
    """``head_z [N, H, dh]`` by layer, at the last prompt token."""
    rows = [prompt.ids for prompt in subject.render(side)]
    last = [len(ids) - 1 for ids in rows]
    read = heads.read(subject.model, rows, last, batch_size=subject.batch_size, sites=sites)
    return {layer: z.float().cpu() for layer, z in read.items()}


def _head(up: Tensor, down: Tensor) -> tuple[float, Tensor]:
    """How well a probe along ``theta`` tells the second halves of two sets ``[N, dh]``, and ``sigma theta``."""
    ends = len(up) // 2, len(down) // 2
    means = up[: ends[0]].mean(0), down[: ends[1]].mean(0)
    theta = functional.normalize(means[0] - means[1], dim=0)
    a, b = up @ theta, down @ theta
    threshold = (a[: ends[0]].mean() + b[: ends[1]].mean()) / 2
    right = (a[ends[0] :] > threshold).double().mean() + (b[ends[1] :] <= threshold).double().mean()
    return float(right) / 2, (torch.cat([a, b]).std() * theta).float()


def angular(
    subject: Subject,
    positive: Sequence[Asked],
    negative: Sequence[Asked],
    degrees: float,
    *,
    adaptive: bool = False,
    name: str = "angular",
) -> Plan:
    """Angular Steering (arXiv 2510.26243): the part of each row in one plane is turned to an absolute angle.

    ``b1`` is the per-layer direction (of normalised states) with the highest mean cosine to the others, ``b2`` the
    first principal component of all of them; 0 degrees is ``b1``. The published code writes norm outputs; here the
    residual stream is turned, at ``resid_pre`` and ``resid_mid`` of every layer, which keeps ``|h|`` exactly.
    ``adaptive`` acts only where ``h b1 > 0``.
    """
    read = [_all(subject, subject.render(side)).double() for side in (positive, negative)]
    means = [functional.normalize(functional.normalize(side, dim=-1).mean(0), dim=-1) for side in read]
    candidates = (means[0] - means[1])[1:]
    units = functional.normalize(candidates, dim=-1)
    first = units[int((units @ units.T).mean(1).argmax())]
    _, _, v = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False)
    turned = rotate(first.float(), v[0].float(), degrees)
    if adaptive:
        turned = turned.when(first.float(), lo=0.0)
    return Plan(turned, site="resid_pre", name=name) + Plan(turned, site="resid_mid", name=name)


def _all(subject: Subject, rendered: Sequence[Rendered]) -> Tensor:
    """States ``[N, L+1, H]`` at the last token."""
    return states(subject.model, rendered, ("t_post",), batch_size=subject.batch_size)[:, :, 0]


def _site(subject: Subject, rendered: Sequence[Rendered], row: int, position: int) -> Tensor:
    """States ``[N, H]`` of one row of the layers at a position."""
    found = torch.empty(len(rendered), subject.width)
    for batch in capture(subject.model, rendered, (position,), batch_size=subject.batch_size):
        found[list(batch.prompts)] = batch.states[row, :, 0].float()
    return found
