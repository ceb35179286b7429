"""Difference-of-means directions: float64 sums of the residual stream over two sets of prompts, in one pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Fingerprint
from ..directions import Directions
from ..runtime.decoder import find_decoder, text_config
from .capture import Captured, capture
from .shards import Ranks, ranks
from .template import Position, Prompt, Rendered, render

# Two means closer than this share of their size are the same mean: float64 sums of n equal float32 rows differ by about
# n * 1e-16, states that differ at all in float32 by 6e-8.
_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Means:
    """Mean and variance of one set of prompts at one position.

    ``mean`` and ``variance`` are float64 ``[L+1, H]``: rows ``0..L-1`` are ``resid_pre``, row ``L`` is the raw output
    of the last block. The variance divides by ``n``.
    """

    position: Position
    n: int
    mean: Tensor
    variance: Tensor

    def at(self, site: str) -> Tensor:
        """The rows ``[L, H]`` of the mean at ``resid_pre[0..L-1]`` or ``resid_post[0..L-1]``."""
        return _rows(self.mean, site)


@dataclass(frozen=True, eq=False)
class Contrast:
    """The means of two sets of prompts at one position, and the record of how they were made."""

    positive: Means
    negative: Means
    model: Fingerprint
    provenance: Mapping[str, Any]

    def directions(self, site: str = "resid_pre", name: str = "directions") -> Directions:
        """``positive - negative`` per layer, raw.

        Where all prompts read the same token at the position, ``resid_pre[0]`` is the same embedding on both sides and
        has no direction; that layer is left out and the provenance lists it.

        Raises:
            ValueError: another site, or equal means at any other layer.
        """
        up, down = self.positive.at(site), self.negative.at(site)
        difference = up - down
        size = torch.maximum(up.norm(dim=1), down.norm(dim=1))
        same = [layer for layer in range(len(up)) if float(difference[layer].norm()) <= _SAME * float(size[layer])]
        for layer in same:
            if layer > 0 or site != "resid_pre" or len(same) == len(up):
                raise ValueError(
                    f"layer {layer}: positive and negative have the same mean at {self.positive.position}, "
                    f"so {name!r} has no direction there"
                )
        vectors = {layer: difference[layer].float() for layer in range(len(up)) if layer not in same}
        provenance = {**self.provenance, "method": "difference of means", "position": self.positive.position}
        return Directions.of(vectors, site, name, self.model, {**provenance, "layers_left_out": same})


def means(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    positions: Sequence[Position] = ("t_inst", "t_post"),
    batch_size: int = 16,
    system: str | None = None,
    template: str | None = "chat",
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    sharded: bool = True,
) -> dict[Position, Contrast]:
    """Means of two sets of prompts at several positions from one pass over each set.

    What belief scores (``cos(h, mu_a) - cos(h, mu_b)``, arXiv 2507.11878) and directions are made of. ``system``,
    ``template`` and ``options`` are those of :func:`~steerkern.extraction.template.render`.

    Under an initialised ``torch.distributed`` process group (``torchrun``) the ranks share the batches out and add up
    with one all-reduce per set: all of them must call this with the same arguments, and all get the same result, that
    of a single process but for the order of float64 sums. A model whose weights are spread over ranks reads every
    prompt on each. ``sharded=False`` has this rank read everything alone.

    Raises:
        ValueError: an empty set, equal sets, a prompt that cannot be rendered or read, a state with NaN or Inf, or
            ranks with different arguments. What one rank raises, all raise.
    """
    sides = {"positive": list(positive), "negative": list(negative)}
    model = getattr(model, "_orig_mod", model)
    group = ranks(model, sharded)

    def prepare() -> dict[str, list[Rendered]]:
        for side, prompts in sides.items():
            if not prompts:
                raise ValueError(f"{side} holds no prompts; both sides are needed")
        if sides["positive"] == sides["negative"]:
            raise ValueError("positive and negative hold the same prompts")
        rendered = {
            side: render(tokenizer, prompts, system=system, template=template, options=options)
            for side, prompts in sides.items()
        }
        for read in rendered.values():
            capture(model, read, positions, batch_size=batch_size)  # checks everything, reads nothing yet
        return rendered

    rendered = group.agree(
        prepare,
        lambda sets: [batch_size, list(positions), {side: [p.ids for p in read] for side, read in sets.items()}],
    )
    made = {side: _means(model, group, side, read, positions, batch_size, progress) for side, read in rendered.items()}
    record = {
        **{side: {"n": len(prompts), "sha256": _digest(prompts)} for side, prompts in sides.items()},
        "tokenizer": _short(getattr(tokenizer, "name_or_path", "")),
        "template": _template_record(tokenizer, template, options),
        "system": system,
        "model": _short(getattr(model.config, "_name_or_path", "")),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "steerkern": _version(),
    }
    fingerprint = _fingerprint(model)
    return {
        position: Contrast(up, down, fingerprint, record)
        for position, up, down in zip(positions, made["positive"], made["negative"], strict=True)
    }


def extract(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: Position = "t_post",
    site: str = "resid_pre",
    batch_size: int = 16,
    system: str | None = None,
    template: str | None = "chat",
    options: Mapping[str, Any] | None = None,
    name: str = "directions",
    progress: bool = True,
    sharded: bool = True,
) -> Directions:
    """Difference of means ``mean(positive) - mean(negative)`` at one token, for every layer, raw.

    With harmful prompts as positive and harmless ones as negative: the refusal direction at ``t_post`` (arXiv
    2406.11717), the harmfulness direction at ``t_inst`` (2507.11878). Sums are float64; equal inputs give equal bits.

    Args:
        model: a transformers decoder-only model; it may be steered at the same time.
        tokenizer: its fast tokenizer.
        positive: prompts that show the behaviour, as text or message lists.
        negative: prompts that do not.
        position: ``t_post`` (last token of the templated prompt), ``t_inst`` (last of the instruction) or one counted
            from the end.
        site: ``resid_pre`` (input of block ``l``) or ``resid_post`` (its raw output), layers ``0..L-1``. Left out is
            ``resid_pre[0]`` where all prompts read the same token at the position, as they do at ``t_post``.
        batch_size: prompts per forward.
        system, template, options: see :func:`~steerkern.extraction.template.render`.
        name: of the directions.
        progress: show a bar on a terminal.
        sharded: share the prompts out over the ranks of an initialised process group, see :func:`means`.

    Raises:
        ValueError: an empty or one-sided set, equal means, NaN or Inf in a state (naming the layer), an unknown site.

    >>> from steerkern import organism
    >>> model, tokenizer = organism.load()
    >>> harmful = [p.messages for p in organism.prompts("harmful", "train", 8)]
    >>> harmless = [p.messages for p in organism.prompts("harmless", "train", 8)]
    >>> list(extract(model, tokenizer, harmful, harmless))
    [1, 2, 3]
    """
    if site not in ("resid_pre", "resid_post"):
        raise ValueError(f"site must be resid_pre or resid_post, got {site!r}")
    contrast = means(
        model,
        tokenizer,
        positive,
        negative,
        positions=(position,),
        batch_size=batch_size,
        system=system,
        template=template,
        options=options,
        progress=progress,
        sharded=sharded,
    )
    return contrast[position].directions(site, name)


def _rows(stack: Tensor, site: str) -> Tensor:
    if site == "resid_pre":
        return stack[:-1]
    if site == "resid_post":
        return stack[1:]
    raise ValueError(f"site must be resid_pre or resid_post, got {site!r}")


def _means(
    model: nn.Module,
    group: Ranks,
    side: str,
    rendered: Sequence[Rendered],
    positions: Sequence[Position],
    batch_size: int,
    progress: bool,
) -> list[Means]:
    def read() -> Tensor:
        """``[1 + 2 * (L+1) * P * H]`` float64: prompts read by this rank, sums and sums of squares of their states."""
        mine = group.share([len(prompt.ids) for prompt in rendered], batch_size)
        total = squares = torch.zeros(shape, dtype=torch.float64)
        shown = progress and group.rank == 0
        own = [rendered[i] for i in mine]
        settings: dict[str, Any] = {"batch_size": batch_size, "progress": shown, "label": f"reading {side}"}
        for batch in capture(model, own, positions, **settings) if mine else ():
            _check_finite(batch, mine, side, positions)
            wide = batch.states.double()
            total = total + wide.sum(1)
            squares = squares + wide.square().sum(1)
        return torch.cat([torch.tensor([float(len(mine))]), total.flatten(), squares.flatten()])

    fingerprint = _fingerprint(model)
    shape = (fingerprint.layers + 1, len(positions), fingerprint.width)
    sums = group.sum(group.agree(read))
    n = int(sums[0])
    mean, mean_square = (part.reshape(shape) / n for part in sums[1:].chunk(2))
    variance = (mean_square - mean.square()).clamp_min(0)
    return [Means(position, n, mean[:, p].clone(), variance[:, p].clone()) for p, position in enumerate(positions)]


def _check_finite(batch: Captured, numbers: Sequence[int], side: str, positions: Sequence[Position]) -> None:
    finite = batch.states.isfinite().all(-1)  # [L+1, n, P]
    if bool(finite.all()):
        return
    layer, row, place = (int(i) for i in (~finite).nonzero()[0])
    last = finite.shape[0] - 1
    where = f"layer {last - 1} (output)" if layer == last else f"layer {layer}"
    prompt = numbers[batch.prompts[row]]
    raise ValueError(f"{where}: NaN or Inf in the state of {side} prompt {prompt} at {positions[place]}")


def _fingerprint(model: nn.Module) -> Fingerprint:
    _, blocks = find_decoder(model)
    return Fingerprint(str(model.config.model_type), int(text_config(model).hidden_size), len(blocks))  # type: ignore[union-attr]


def _digest(prompts: Sequence[Prompt]) -> str:
    plain = [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _template_record(tokenizer: Any, template: str | None, options: Mapping[str, Any] | None) -> dict[str, Any] | str:
    if template is None or template == "plain":
        return "plain"
    text: str = tokenizer.get_chat_template() if template == "chat" else template
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "options": dict(options or {})}


def _short(name: object) -> str:
    """A hub id as it is; of a local folder only its name, so that no one's paths travel with a file."""
    text = str(name)
    return Path(text).name if Path(text).is_absolute() or text.count("/") != 1 else text


def _version() -> str:
    from .. import __version__

    return __version__
