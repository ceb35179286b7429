"""The Latent Guard: a prompt is harmful if its instruction lies nearer to the harmful centre, averaged over layers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...artifacts import Fingerprint, fingerprint_from_json, fingerprint_to_json, read_folder, take, write_folder
from ...decisions import Condition, Latch, Read, Term
from ...errors import ArtifactError, PlanError
from ...extraction import Prompt, instruction_offset, means, render, states
from ...vectors import finite

_KEYS = ("offset", "template", "threshold")


def cluster_score(states: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``s_l(h) = cos(h_l, mu_a[l]) - cos(h_l, mu_b[l])`` (arXiv 2507.11878, section 4).

    Args:
        states: ``[..., L+1, H]``.
        positive: centre ``mu_a [L+1, H]``.
        negative: centre ``mu_b [L+1, H]``.

    Returns:
        ``[..., L+1]`` float32; 0 where both centres are equal, as at layer 0 of a token that all prompts share.
    """
    h = states.float()
    return functional.cosine_similarity(h, positive.float(), dim=-1) - functional.cosine_similarity(
        h, negative.float(), dim=-1
    )


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """Centres ``[L+1, H]`` of harmful and harmless prompts at ``t_inst``, and the threshold of the layer-mean score.

    Rows are ``resid_pre[0..L-1]`` and the raw ``resid_post[L-1]``. ``offset`` is ``t_inst`` counted from the prompt's
    end, which the gate of a plan needs.
    """

    harmful: Tensor
    harmless: Tensor
    offset: int
    model: Fingerprint
    template: str = "chat"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("harmful", "harmless"):
            centre = getattr(self, name)
            if centre.shape != (self.model.layers + 1, self.model.width) or not bool(centre.isfinite().all()):
                raise ValueError(f"the {name} centre must be [{self.model.layers + 1}, {self.model.width}] and finite")
            object.__setattr__(self, name, centre.detach().cpu().float())
        finite(self.threshold, "threshold")
        if type(self.offset) is not int or self.offset >= 0:
            raise ValueError(f"offset must be a position below 0, got {self.offset!r}")

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        harmful: Sequence[Prompt],
        harmless: Sequence[Prompt],
        *,
        batch_size: int = 16,
        template: str = "chat",
    ) -> LatentGuard:
        """Centres of prompts that the model refuses and of prompts that it answers.

        Raises:
            ValueError: an empty side, prompts that cannot be read, or whose ``t_inst`` lies at different offsets.
        """
        rendered = render(tokenizer, [*harmful, *harmless], template=template)
        contrast = means(
            model, tokenizer, harmful, harmless, positions=("t_inst",), batch_size=batch_size, template=template
        )["t_inst"]
        up, down = contrast.positive.mean, contrast.negative.mean
        return cls(up.float(), down.float(), instruction_offset(rendered), contrast.model, template)

    def scores(self, states: Tensor) -> Tensor:
        """``Delta_harm [N]`` of states ``[N, L+1, H]`` at ``t_inst``: the mean of the cluster score over layers."""
        return cluster_score(states, self.harmful, self.harmless).mean(-1)

    def score(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int = 16) -> Tensor:
        """``Delta_harm [N]`` of prompts.

        Raises:
            PlanError: a model of another family, width or depth.
        """
        self._check(model)
        rendered = render(tokenizer, prompts, template=self.template)
        return self.scores(states(model, rendered, ("t_inst",), batch_size=batch_size)[:, :, 0])

    def predict(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int = 16) -> list[bool]:
        """Whether each prompt is harmful."""
        scores = self.score(model, tokenizer, prompts, batch_size=batch_size)
        return [value >= self.threshold for value in scores.tolist()]

    def latch(self, *, harmful: bool = True) -> Latch:
        """The same decision as the gate of a plan: the step acts for harmful requests (or for the others).

        >>> # sk.Plan(sk.add(direction), layers=12, scope="reply", latch=guard.latch())
        """
        depth = self.model.layers
        reads = [Read(layer, "resid_pre", self.offset) for layer in range(depth)]
        reads.append(Read(depth - 1, "resid_post", self.offset))
        share = 1.0 / len(reads)
        terms = [Term(read, self.harmful[i], share) for i, read in enumerate(reads)]
        terms += [Term(read, self.harmless[i], -share) for i, read in enumerate(reads)]
        if harmful:
            return Latch((Condition(tuple(terms), lo=self.threshold),))
        return Latch((Condition(tuple(terms), hi=math.nextafter(self.threshold, -math.inf)),))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``latent_guard.json`` and its tensors.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        header = {"model": fingerprint_to_json(self.model), **{key: getattr(self, key) for key in _KEYS}}
        write_folder(folder, "latent_guard", header, {"harmful": self.harmful, "harmless": self.harmless})

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str]) -> LatentGuard:
        """Read what :meth:`save_pretrained` wrote, from a folder or hub id.

        Raises:
            ArtifactError: naming what is wrong with it.
        """
        header, tensors = read_folder(source, "latent_guard")
        try:
            take(header, "the file", ("model", *_KEYS))
            model = fingerprint_from_json(header["model"])
            if model is None or set(tensors) != {"harmful", "harmless"}:
                raise ValueError("a guard needs its model and the centres harmful and harmless")
            if header["template"] not in ("chat", "plain"):
                raise ValueError(f"template must be chat or plain, got {header['template']!r}")
            return LatentGuard(model=model, **tensors, **{key: header[key] for key in _KEYS})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"latent_guard.json: {error}") from None

    def _check(self, model: Any) -> None:
        from ...runtime.decoder import text_config

        config = text_config(model)
        found = Fingerprint(str(model.config.model_type), int(config.hidden_size), int(config.num_hidden_layers))
        if found != self.model:
            raise PlanError(f"the guard was made for {self.model}, the model is {found}")


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve of two sets of scores ``[N]``: how often a positive one is the larger."""
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    return float(roc_auc_score(labels.numpy(), torch.cat([positive, negative]).numpy()))
