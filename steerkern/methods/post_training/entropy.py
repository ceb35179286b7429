"""Entropy neurons: those of the last MLP that write much, but towards no word more than towards another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.decoder import find_decoder, text_config

CANDIDATES = 0.25
"""Share of the neurons, by the norm of their output vector, among which they are looked for."""
COUNT = 10
OUTPUTS = ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "fc_out", "w2", "output_linear")
"""Names of the matrix that leads out of an MLP."""


@dataclass(frozen=True, eq=False)
class Neurons:
    """``norm [M]`` and ``variance [M]`` (LogitVar) of all neurons; ``found`` are the numbers of the entropy neurons."""

    norm: Tensor
    variance: Tensor
    found: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Mean of ``norm / log(LogitVar)`` over the entropy neurons; the further below 0, the larger the norm."""
        at = list(self.found)
        return float((self.norm[at] / self.variance[at].log()).mean())


def entropy_neurons(model: nn.Module, count: int = COUNT) -> Neurons:
    """The ``count`` neurons of smallest ``LogitVar_n = Var_v cos(w_n, W_U[:, v])`` among the quarter of largest norm.

    Raises:
        ValueError: the last block has no single matrix that leads out of its MLP (a mixture of experts has several).
    """
    written = _output_matrix(model).detach().float()  # [M, H], one row per neuron
    unembedding: Any = model.get_output_embeddings()  # type: ignore[operator]
    words = nn.functional.normalize(unembedding.weight.detach().float(), dim=-1)
    norm = written.norm(dim=-1)
    cosines = nn.functional.normalize(written, dim=-1).split(1024)
    variance = torch.cat([(part @ words.T).var(dim=-1, correction=0) for part in cosines])
    candidates = norm.topk(max(int(CANDIDATES * len(norm)), 1)).indices
    chosen = candidates[variance[candidates].argsort()[:count]]
    return Neurons(norm.cpu(), variance.cpu(), tuple(sorted(chosen.tolist())))


def overlap(one: Neurons, other: Neurons) -> float:
    """Intersection over union of the two sets of entropy neurons."""
    a, b = set(one.found), set(other.found)
    return len(a & b) / len(a | b)


def _output_matrix(model: nn.Module) -> Tensor:
    _, blocks = find_decoder(model)
    width = int(text_config(model).hidden_size)
    attention = ("attn", "attention")
    found = [
        module
        for name, module in blocks[-1].named_modules()
        if name.split(".")[-1] in OUTPUTS and not any(part in name for part in attention) and hasattr(module, "weight")
    ]
    if len(found) != 1 or width not in found[0].weight.shape:
        raise ValueError(f"the last block has {len(found)} matrices that lead out of an MLP; entropy neurons need one")
    weight: Tensor = found[0].weight
    # GPT-2's Conv1D keeps [M, H], a Linear [H, M]
    return weight.T if isinstance(found[0], nn.Linear) else weight
