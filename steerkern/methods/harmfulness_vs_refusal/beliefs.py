"""What the model believes of each prompt at every layer: harmful (at ``t_inst``) and to be refused (at ``t_post``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...extraction import means, states
from ...subject import Subject
from .guard import LatentGuard, cluster_score
from .pools import Pools


@dataclass(frozen=True, eq=False)
class Beliefs:
    """Directions ``[L+1, H]``, raw, and the layer-mean cluster scores of held-out prompts by pool, ``[N]`` each.

    A row of ``refusal`` is zero where both centres are equal (layer 0 of a token that all prompts share).
    """

    harm: Tensor
    refusal: Tensor
    harm_scores: Mapping[str, Tensor]
    refusal_scores: Mapping[str, Tensor]

    def cosines(self) -> Tensor:
        """``cos(v_harm, v_ref) [L+1]``; 0 where one of them is zero."""
        return functional.cosine_similarity(self.harm, self.refusal, dim=-1, eps=1e-12)


def believe(subject: Subject, train: Pools, heldout: Pools, guard: LatentGuard, centre: int) -> Beliefs:
    """Centres of the refusal side, and the scores of held-out prompts.

    The refused pool of the centres is refused-harmful and the accepted one accepted-harmless (App. B of the paper).
    """
    refused, accepted = train.refused_harmful[:centre], train.accepted_harmless[:centre]
    size = subject.batch_size
    contrast = means(
        subject.model,
        subject.tokenizer,
        refused,
        accepted,
        positions=("t_post",),
        batch_size=size,
        template=subject.template,
    )["t_post"]
    up, down = contrast.positive.mean.float(), contrast.negative.mean.float()
    pools = heldout.named()
    rendered = subject.render([prompt for pool in pools.values() for prompt in pool])
    read = states(subject.model, rendered, ("t_inst", "t_post"), batch_size=size)
    lengths = [len(pool) for pool in pools.values()]
    harm = guard.scores(read[:, :, 0]).split(lengths)
    refusal = cluster_score(read[:, :, 1], up, down).mean(-1).split(lengths)
    return Beliefs(
        guard.harmful - guard.harmless,
        _without_noise(up - down, torch.maximum(up.norm(dim=-1), down.norm(dim=-1))),
        dict(zip(pools, harm, strict=True)),
        dict(zip(pools, refusal, strict=True)),
    )


def _without_noise(difference: Tensor, size: Tensor) -> Tensor:
    return torch.where((difference.norm(dim=-1) > 1e-6 * size)[:, None], difference, torch.zeros(()))
