"""Whether a peer steers what it was asked to steer: outcomes, each compared with plain hooks on the same model in fp32.

A state counts as the reference's where the logits differ from it by at most a thousandth of what the edit changes.
References come in three scopes (every token, the prompt's, the generated ones'), so that a peer that forgets some
tokens fails the check of those tokens and is still judged fairly on rows, layers and padding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Edit, Inputs, Kind, Rows, Steered, editing, generate

TOKENS = 5
SCOPES = ("all", "generated", "prompt")
TOLERANCE = 1e-3


class WeakEdit(Exception):
    """The edit changes too little for a comparison to mean anything."""


class NotRestored(Exception):
    """What a removal left behind."""


@dataclass(frozen=True)
class Verdict:
    """``"yes"``, ``"no"`` or ``"n/a"`` by check, and what a check that raised said."""

    correct: dict[str, str]
    raised: dict[str, str]


@dataclass(frozen=True)
class Case:
    """A peer with a kind of edit, and the model it is tried on."""

    adapter: Adapter
    model: Any
    kind: Kind

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return int(self.model.config.num_hidden_layers)

    def edit(self, seed: int, layers: Sequence[int] | None = None) -> Edit:
        """A random edit, of its own direction at every layer, strong enough to be seen."""
        chosen = range(self.layers) if layers is None else layers
        generator = torch.Generator().manual_seed(seed)
        rank, width = 4 if self.kind == "rank 4" else 1, self.model.config.hidden_size
        rows = {layer: torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T for layer in chosen}
        return Edit(self.kind, {layer: v.contiguous() for layer, v in rows.items()}, strength=2.0)

    def prompts(self, lengths: Sequence[int]) -> Inputs:
        """Random prompts of these lengths, padded on the left."""
        generator, longest = torch.Generator().manual_seed(5), max(lengths)
        ids = torch.randint(3, self.model.config.vocab_size, (len(lengths), longest), generator=generator)
        mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    def found(self, rows: Rows, inputs: Inputs) -> Tensor:
        """Logits ``[B, TOKENS, V]`` of the model as the peer steers it."""
        with self.adapter.steer(copy.deepcopy(self.model), rows) as steered:
            return logits(steered, inputs)

    def agrees(self, rows: Rows, inputs: Inputs, scopes: Sequence[str] = SCOPES) -> Tensor:
        """``[B, TOKENS]``: which rows have, up to each step, the logits of one of the references.

        Raises:
            WeakEdit: the edit changes too little for the comparison to mean anything.
        """
        plain = generating(self.model)
        stock, found = logits(plain, inputs), self.found(rows, inputs)
        steered = torch.ones(found.shape[0], dtype=torch.bool)
        if len(rows) > 1:
            steered = torch.tensor([edit is not None for edit in rows])
        agreed = torch.zeros(found.shape[:2], dtype=torch.bool)
        for scope in scopes:
            with editing(self.adapter.means(self.model, rows), scope):
                wanted = logits(plain, inputs)
            effect = (wanted - stock).abs().amax((1, 2))
            if bool((effect[steered] < 1e-2 * stock.abs().max()).any()):
                raise WeakEdit(f"the edit changes logits of up to {stock.abs().max()} by {effect.tolist()}")
            allowed = TOLERANCE * torch.where(steered, effect, effect.max())
            close = (found - wanted).abs().amax(-1) <= allowed[:, None]
            agreed |= close.cumprod(1).bool()
            if bool(agreed.all()):
                break
        return agreed


def generating(model: Any) -> Steered:
    """A model under transformers' own ``generate``."""
    return Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))


@torch.no_grad()
def logits(steered: Steered, inputs: Inputs) -> Tensor:
    """The logits ``[B, TOKENS, V]`` that the model itself computes at each step of ``generate``."""
    seen: list[Tensor] = []
    with watched(steered.head or steered.model.lm_head, seen):
        steered.generate(inputs, TOKENS)
    return torch.stack(seen[:TOKENS], dim=1)


@contextlib.contextmanager
def watched(head: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep the last position of every output of ``head``, without a hook: some peers remove the hooks of others."""
    forward = head.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output[:, -1].detach().clone())
        return output

    head.forward = kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def every_row(case: Case) -> bool:
    """All rows of a batch, and not the first alone."""
    return bool(case.agrees([case.edit(1)], case.prompts([7, 7, 7])).all())


def prompt_tokens(case: Case) -> bool:
    """The first new token comes from a prompt that is steered at every position."""
    return bool(case.agrees([case.edit(1)], case.prompts([7]), ("all",))[:, 0].all())


def generated_tokens(case: Case) -> bool:
    """Every later token is steered too, read from the cache of the ones before, whatever became of the prompt."""
    return bool(case.agrees([case.edit(1)], case.prompts([7]), ("all", "generated")).all())


def right_layer(case: Case) -> bool:
    """Two layers, each with its own direction."""
    rows = [case.edit(1, layers=(1, case.layers - 2))]
    return bool(case.agrees(rows, case.prompts([7])).all())


def left_padding(case: Case) -> bool:
    """Prompts of several lengths in one batch."""
    return bool(case.agrees([case.edit(1)], case.prompts([7, 4, 2])).all())


def plan_per_row(case: Case) -> bool:
    """Two rows with an edit each and one that stays plain."""
    return bool(case.agrees([case.edit(1), None, case.edit(2)], case.prompts([7, 7, 7])).all())


def two_models(case: Case) -> bool:
    """A model stays steered as it was while another one is steered otherwise."""
    inputs, rows, others = case.prompts([7]), [case.edit(1)], [case.edit(2)]
    with case.adapter.steer(copy.deepcopy(case.model), rows) as one:
        alone = logits(one, inputs)
        with case.adapter.steer(copy.deepcopy(case.model), others) as other:
            beside, theirs = logits(one, inputs), logits(other, inputs)
        after = logits(one, inputs)
    return torch.equal(alone, beside) and torch.equal(alone, after) and not torch.equal(alone, theirs)


def restored(case: Case) -> bool:
    """After removal the same modules with the same bits, and the hook of somebody else, give the same bits."""
    model = copy.deepcopy(case.model)
    inputs, norm, own = case.prompts([7, 4]), model.model.norm, structure(model)
    norm.register_forward_hook(lambda module, args, output: None)
    before, hooked, weights = logits(generating(model), inputs), structure(model), copy.deepcopy(model.state_dict())
    with case.adapter.steer(model, [case.edit(1)]) as steered:
        logits(steered, inputs)
    after = steered.model
    if not norm._forward_hooks:
        raise NotRestored("it removed the hook of somebody else")
    if structure(after) != (hooked if after is model else own):
        raise NotRestored("modules, hooks or forwards are not those of before")
    weights_differ = [name for name, found in after.state_dict().items() if not torch.equal(found, weights[name])]
    if weights_differ:
        raise NotRestored(f"weights differ, the first is {weights_differ[0]}")
    if not torch.equal(logits(generating(after), inputs), before):
        frozen = any(not weight.requires_grad for weight in after.parameters())
        raise NotRestored("the logits differ" + ("; its weights are left frozen" if frozen else ""))
    return True


def structure(model: nn.Module) -> list[tuple[object, ...]]:
    """Each module's name, class, hooks and the code of its forward."""
    return [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks), code_of(module))
        for name, module in model.named_modules()
    ]


def code_of(module: nn.Module) -> object:
    """The function behind a module's forward."""
    return getattr(module.forward, "__func__", module.forward)


CHECKS: dict[str, Callable[[Case], bool]] = {
    "every row": every_row,
    "prompt tokens": prompt_tokens,
    "generated tokens": generated_tokens,
    "right layer": right_layer,
    "left padding": left_padding,
    "plan per row": plan_per_row,
    "two models": two_models,
    "restored": restored,
}


def first_line(error: Exception) -> str:
    """What an exception says, short."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def judge(adapter: Adapter, model: Any, kind: Kind) -> Verdict:
    """Run every check.

    Args:
        adapter: the peer.
        model: a transformers Llama in fp32 with at least 4 layers; copied, never changed.
        kind: the edit, one of the adapter's.
    """
    case = Case(adapter, model, kind)
    correct: dict[str, str] = {}
    raised: dict[str, str] = {}
    for name, check in CHECKS.items():
        if check is plan_per_row and not adapter.per_row:
            correct[name] = "n/a"
            continue
        try:
            correct[name] = "yes" if check(case) else "no"
        except WeakEdit:
            raise
        except Exception as error:  # whatever a peer raises is its outcome
            correct[name], raised[name] = "no", first_line(error)
    return Verdict(correct, raised)
