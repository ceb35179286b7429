"""The controller's network: states of a prompt to one strength and one weight per layer (arXiv 2505.20309)."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..artifacts import (
    MAX_LAYERS,
    MAX_WIDTH,
    Fingerprint,
    check_name,
    expect,
    fingerprint_from_json,
    fingerprint_to_json,
    read_folder,
    take,
    write_folder,
)
from ..decisions import Read, check_read
from ..directions import check_layer
from ..edits import Source, add
from ..errors import ArtifactError, PlanError
from ..steps import Scope, parse_layers

if TYPE_CHECKING:  # plans hold controllers
    from ..plan import Plan

Weights = Literal["sigmoid", "softmax"]
"""How raw outputs become layer weights: ``sigmoid``, each on its own in (0, 1), or ``softmax`` times half the number of
layers, which shares out the same sum. An untrained controller of either kind gives about 1/2 to every layer."""
MAX_READS = 1024
"""Of one controller; the largest models have about a hundred layers."""
_RECORD = ("reads", "layers", "width", "hidden", "layer_norm", "weights", "every_token", "model", "provenance")


class Controller(nn.Module):
    """``x = concat(states)``, ``(s, u) = W2 relu(W1 x + b1) + b2``, ``w = sigmoid(u)``: gains ``s * w_l``.

    A plan multiplies what it adds at layer ``l`` by ``s * w_l``: the guided controller of arXiv 2505.20309, section 3,
    which satisfies :class:`~steerkern.decisions.Gains`. ``s`` is raw: it may be negative, or above 1.

    Args:
        reads: the ``R`` states that it reads, in the order in which they are given to it.
        layers: the ``L`` layers that it weighs.
        width: ``H`` of the states.
        hidden: hidden units.
        layer_norm: normalise each state before the first layer (one learned scale and shift of width ``H``).
        weights: see :data:`Weights`.
        every_token: ask it in every forward about that forward's last token, not once about the prompt.
        model: the model whose states it reads; None fits any of that width.
        provenance: JSON record of how it was trained.
        seed: of the initial weights.

    Raises:
        ValueError: no read or layer, one listed twice, or a size that is not allowed.

    >>> made = Controller([Read(1, "resid_post")], [0, 1, 2], width=8, hidden=4)
    >>> made.gains(torch.zeros(2, 1, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        reads: Sequence[Read],
        layers: int | Sequence[int],
        width: int,
        *,
        hidden: int = 1024,
        layer_norm: bool = False,
        weights: Weights = "sigmoid",
        every_token: bool = False,
        model: Fingerprint | None = None,
        provenance: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.reads = tuple(check_read(Read(*read)) for read in reads)
        self.layers = parse_layers(layers) or ()
        self.width = _size(width, "width", MAX_WIDTH)
        self.hidden = _size(hidden, "hidden", MAX_WIDTH)
        self.layer_norm, self.every_token = bool(layer_norm), bool(every_token)
        self.weights: Weights = weights
        self.model = model
        self.provenance = _json(provenance or {})
        _size(len(self.reads), "the number of reads", MAX_READS)
        _size(len(self.layers), "the number of layers", MAX_LAYERS)
        if len(set(self.reads)) < len(self.reads):
            raise ValueError(f"reads must be listed once, got {reprlib.repr(list(map(str, self.reads)))}")
        if weights not in get_args(Weights):
            raise ValueError(f"weights must be {' or '.join(get_args(Weights))}, got {reprlib.repr(weights)}")
        if self.every_token and any(read.token != -1 for read in self.reads):
            raise ValueError("a controller that is asked at every token reads token -1 only")
        if model is not None:
            self.check_model(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width) if self.layer_norm else nn.Identity()
            self.input = nn.Linear(len(self.reads) * width, hidden)
            self.output = nn.Linear(hidden, 1 + len(self.layers))

    def scores(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """``s [B]`` and ``w [B, L]``, float32, from states ``[B, R, H]`` of any dtype, on their device.

        Raises:
            ValueError: states of another shape.
        """
        if states.dim() != 3 or tuple(states.shape[1:]) != (len(self.reads), self.width):
            raise ValueError(f"states must be [B, {len(self.reads)}, {self.width}], got {list(states.shape)}")
        if self.input.weight.device != states.device:
            self.to(states.device)
        out = self.output(torch.relu(self.input(self.norm(states.float()).flatten(1))))
        raw = out[:, 1:]
        w = torch.sigmoid(raw) if self.weights == "sigmoid" else torch.softmax(raw, -1) * (len(self.layers) / 2)
        return out[:, 0], w

    def gains(self, states: Tensor, *, grad: bool = False) -> Tensor:
        """``s * w``, float32 ``[B, L]``, from states ``[B, R, H]``; differentiable if ``grad``."""
        with torch.set_grad_enabled(grad):
            s, w = self.scores(states)
            return s[:, None] * w

    def check_model(self, model: Fingerprint) -> None:
        """Raise PlanError unless this controller reads and weighs states of ``model``."""
        if self.model is not None and self.model != model:
            raise PlanError(f"the controller was made for {self.model}, the model is {model}")
        if self.width != model.width:
            raise PlanError(f"the controller reads width {self.width}, the model is {model}")
        for layer in (*(read.layer for read in self.reads), *self.layers):
            if layer >= model.layers:
                raise PlanError(f"layer {layer} of the controller: the model has layers 0..{model.layers - 1}")

    def plan(
        self,
        source: Source,
        alpha: float,
        *,
        site: str = "resid_post",
        scope: Scope = "decode",
        name: str = "guided",
    ) -> Plan:
        """The plan ``h += alpha * s * w_l * d_l`` at every layer ``l`` that this controller weighs.

        Args:
            source: one direction ``d [H]`` for all layers, or one per layer; see :func:`steerkern.add`.
            alpha: global strength, in units of the norm of ``d``.
            site: where it is written.
            scope: ``"decode"`` as published: the first generated token is not steered, because its logits come from the
                prompt; ``"reply"`` also writes the last prompt token.
            name: of the plan.

        Raises:
            ValueError, TypeError, PlanError: as for :class:`~steerkern.plan.Plan`.
        """
        from ..plan import Plan

        edit = add(source, alpha)
        if self.model is not None:
            if edit.model not in (None, self.model):
                raise PlanError(f"the controller was made for {self.model}, the directions for {edit.model}")
            edit = dataclasses.replace(edit, model=self.model)
        return Plan(edit, layers=self.layers, site=site, scope=scope, controller=self, name=name)

    def record_training(self, provenance: Mapping[str, Any]) -> None:
        """Keep how it was trained; ValueError if that is not JSON."""
        self.provenance = _json(provenance)

    # controls

    def uniform(self) -> Controller:
        """The same strength with the weight 1/2 at every layer: the ablation "scalar only" of the paper."""
        made = copy.deepcopy(self)
        with torch.no_grad():
            made.output.weight[1:] = 0.0
            made.output.bias[1:] = 0.0
        return made

    def shuffled(self, seed: int = 0) -> Controller:
        """The same strength and the same weights, each at another layer.

        Raises:
            ValueError: fewer than two layers.
        """
        count = len(self.layers)
        if count < 2:
            raise ValueError(f"weights can be shuffled among at least 2 layers, the controller weighs {count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order[(order.argsort() + 1) % count]])
        made = copy.deepcopy(self)
        with torch.no_grad():
            made.output.weight[:] = self.output.weight[rows]
            made.output.bias[:] = self.output.bias[rows]
        return made

    # storing

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON values and tensors (float32, 1 or 2 dimensions) from which :meth:`from_record` makes it again."""
        values = (
            [list(read) for read in self.reads],
            list(self.layers),
            self.width,
            self.hidden,
            self.layer_norm,
            self.weights,
            self.every_token,
            fingerprint_to_json(self.model),
            self.provenance,
        )
        # one row per hidden unit and read: ten reads of width 16384 are wider than the format allows
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        weights["input.weight"] = weights["input.weight"].view(-1, self.width)
        return dict(zip(_RECORD, values, strict=True)), weights

    @classmethod
    def from_record(cls, record: object, tensors: Mapping[str, Tensor]) -> Controller:
        """Make the controller that :meth:`to_record` described.

        Raises:
            ValueError: one sentence about the first value or tensor that is not allowed.
        """
        found = take(record, "a controller", _RECORD)
        reads = [_read_from_json(read) for read in expect(found["reads"], list, "reads")]
        layers = [check_layer(layer) for layer in expect(found["layers"], list, "layers")]
        if sorted(set(layers)) != layers:
            raise ValueError(f"layers must rise, got {reprlib.repr(layers)}")
        options: dict[str, Any] = {
            "hidden": _size(found["hidden"], "hidden", MAX_WIDTH),
            "layer_norm": expect(found["layer_norm"], bool, "layer_norm"),
            "weights": expect(found["weights"], str, "weights"),
            "every_token": expect(found["every_token"], bool, "every_token"),
            "model": fingerprint_from_json(found["model"]),
            "provenance": expect(found["provenance"], dict, "provenance"),
        }
        # nothing is allocated for the sizes that the record claims: the tensors that came with it are taken
        with torch.device("meta"):
            made = cls(reads, layers, found["width"], **options)
        shapes = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
        stored = {**shapes, "input.weight": [made.hidden * len(reads), made.width]}
        if set(tensors) != set(stored):
            raise ValueError(f"a controller has the tensors {', '.join(sorted(stored))}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            if list(tensor.shape) != stored[name] or tensor.dtype != torch.float32:
                raise ValueError(f"{name} must be float32 {stored[name]}, got {tensor.dtype} {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds NaN or Inf")
        weights = {name: tensor.detach().clone().view(shapes[name]) for name, tensor in tensors.items()}
        made.load_state_dict(weights, assign=True)
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], name: str = "controller") -> None:
        """Write ``controller.json`` and ``directions.safetensors`` into ``folder``.

        Raises:
            ArtifactError: the folder cannot be written, or the controller is over a limit of the format.
        """
        record, tensors = self.to_record()
        write_folder(folder, "controller", {"name": check_name(name, "name"), **record}, tensors)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], model: Fingerprint | None = None) -> Controller:
        """Read a folder or hub id that :meth:`save_pretrained` wrote, for ``model`` where that is given.

        Raises:
            ArtifactError: naming the file and what is wrong with it.
            PlanError: it was made for another model.
        """
        header, tensors = read_folder(source, "controller")
        try:
            check_name(header.pop("name", None), "name")
            made = cls.from_record(header, tensors)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"controller.json: {error}") from None
        if model is not None:
            made.check_model(model)
        return made


def _size(value: object, what: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{what} must be a whole number from 1 to {most}, got {reprlib.repr(value)}")
    return value


def _json(record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads(json.dumps(dict(record), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be JSON: {error}") from None
    return made


def _read_from_json(value: object) -> Read:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"a read must be [layer, site, token], got {reprlib.repr(value)}")
    return check_read(Read(*value))
