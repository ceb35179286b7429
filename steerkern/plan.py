"""Plans: which edits, at which layers and site, on which tokens; composed with ``+``, saved and loaded."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .artifacts import (
    Fingerprint,
    check_name,
    expect,
    fingerprint_from_json,
    fingerprint_to_json,
    read_folder,
    take,
    write_folder,
)
from .decisions import Gains, Latch
from .edits import Edit
from .errors import ArtifactError, PlanError
from .ops.schemas import MAX_ENTRIES
from .plan_format import step_from_json, step_to_json
from .steps import Layers, Scope, Step, describe, parse_layers, parse_scope
from .vectors import finite


class Plan:
    """What a person writes: edits + layers + site + tokens, named.

    Args:
        edits: one :class:`Edit` or several; they act simultaneously on the row as it arrived.
        layers: ``"all"``, a layer number, or several. Layers count decoder blocks from 0.
        site: ``resid_pre`` (input of the block), ``resid_mid`` (after attention) or ``resid_post`` (output).
        scope: ``"all"``, ``"prompt"``, ``"decode"``, ``"reply"`` (the last prompt token and all after it), prompt
            positions such as ``-1`` or ``(-1, -5)``, or :class:`Tokens`.
        keep_norm: rescale each edited row to the norm with which it arrived.
        scale: multiplies what every edit adds to the row; 1 is the edit as written.
        latch: the plan acts only in requests whose prompt opens it, see :class:`~steerkern.decisions.Latch`.
        controller: gives each request one strength per layer, see :class:`~steerkern.controller.Controller`.

    Raises:
        ValueError, TypeError: an argument outside what is allowed.
        PlanError: a layer without a vector, edits of different widths or models, more than 64 entries on a row.

    >>> import torch
    >>> from steerkern import ablate
    >>> plan = Plan(ablate(torch.ones(8)), layers=[1, 2], name="open")
    >>> plan
    Plan('open': ablate at resid_pre[1, 2])
    """

    name: str
    steps: tuple[Step, ...]

    def __init__(
        self,
        edits: Edit | Sequence[Edit],
        *,
        layers: Layers = "all",
        site: str = "resid_pre",
        scope: Scope = "all",
        keep_norm: bool = False,
        scale: float = 1.0,
        latch: Latch | None = None,
        controller: Gains | None = None,
        name: str = "plan",
    ) -> None:
        several = (edits,) if isinstance(edits, Edit) else edits
        if not isinstance(several, Sequence) or not several or not all(isinstance(e, Edit) for e in several):
            raise TypeError(f"edits must be one Edit or several, got {reprlib.repr(edits)}")
        size = finite(scale, "scale", nonzero=True)
        tokens = parse_scope(scope)
        step = Step(tuple(several), parse_layers(layers), site, tokens, bool(keep_norm), size, latch, controller)
        self._set(check_name(name, "plan name"), (step,))

    def _set(self, name: str, steps: tuple[Step, ...]) -> None:
        self.name, self.steps = name, steps
        edits = [edit for step in steps for edit in step.edits]
        widths = {edit.width for edit in edits}
        if len(widths) > 1:
            raise PlanError(f"plan {name!r} mixes edits of widths {sorted(widths)}")
        models = {edit.model for edit in edits} - {None}
        if len(models) > 1:
            raise PlanError(f"plan {name!r} mixes directions of several models: {', '.join(sorted(map(str, models)))}")
        for step in steps:
            entries = sum(edit.entries for edit in step.edits)
            if entries > MAX_ENTRIES:
                raise PlanError(f"plan {name!r} puts {entries} entries on one row, allowed are {MAX_ENTRIES}")
            if step.layers is None and len({edit.layers for edit in step.edits}) > 1:
                raise PlanError(f"plan {name!r} has edits with vectors for different layers: name the layers")
            for edit in step.edits:
                if edit.site not in (None, step.site):
                    raise PlanError(
                        f"{edit.kind} has the directions of {edit.site}, plan {name!r} writes {step.site}; "
                        "pass them as {layer: direction} to do that on purpose"
                    )
                missing = set() if edit.layers is None else set(step.layers or ()) - set(edit.layers)
                if missing:
                    own = reprlib.repr(list(edit.layers or ()))
                    raise PlanError(f"layer {min(missing)}: {edit.kind} has vectors for layers {own}, plan {name!r}")

    @property
    def width(self) -> int:
        """Width ``H`` of the directions."""
        return self.steps[0].edits[0].width

    @property
    def model(self) -> Fingerprint | None:
        """The model that the directions were read from, where it is known."""
        return next((e.model for step in self.steps for e in step.edits if e.model is not None), None)

    @functools.cached_property
    def probing(self) -> tuple[Step, ...]:
        """The steps that have a probe."""
        return tuple(step for step in self.steps if any(edit.kind == "probe" for edit in step.edits))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what the plan does, whatever its name."""
        steps, tensors = self._record()
        digest = hashlib.sha256(json.dumps(steps).encode())
        for key in sorted(tensors):
            digest.update(f"{key} {tuple(tensors[key].shape)}".encode())
            digest.update(tensors[key].float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __add__(self, other: Plan) -> Plan:
        """Both plans on the same rows: edits that meet at a site act simultaneously.

        Raises:
            PlanError: the plans differ in width or model.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        name = self.name if other.name == self.name else f"{self.name}+{other.name}"
        return self._of(name[:128], self.steps + other.steps)

    def named(self, name: str) -> Plan:
        """The same plan under another name; ValueError if that is none."""
        return self._of(check_name(name, "plan name"), self.steps)

    def scaled(self, factor: float) -> Plan:
        """The same plan with every step's scale multiplied by ``factor``; ValueError if that is not finite, or 0."""
        number = finite(factor, "scale", nonzero=True)
        return self._of(self.name, tuple(replace(step, scale=step.scale * number) for step in self.steps))

    def scoped(self, scope: Scope) -> Plan:
        """The same plan on other tokens, all its steps alike; ValueError for a scope that is none."""
        tokens = parse_scope(scope)
        return self._of(self.name, tuple(replace(step, tokens=tokens) for step in self.steps))

    @classmethod
    def _of(cls, name: str, steps: tuple[Step, ...]) -> Plan:
        plan = cls.__new__(cls)
        plan._set(name, steps)
        return plan

    def __repr__(self) -> str:
        return f"Plan({self.name!r}: {'; '.join(map(describe, self.steps))})"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json`` and ``directions.safetensors`` into ``folder``.

        Raises:
            ArtifactError: the folder cannot be written, or the plan is over a limit of the format.
        """
        steps, tensors = self._record()
        header = {"name": self.name, "model": fingerprint_to_json(self.model), "steps": steps}
        write_folder(folder, "plan", header, tensors)

    def _record(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        controllers: list[Gains] = []
        return [step_to_json(step, i, tensors, controllers) for i, step in enumerate(self.steps)], tensors

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str]) -> Plan:
        """Read a folder or hub id that :meth:`save_pretrained` wrote.

        Raises:
            ArtifactError: naming the file and what is wrong with it.
        """
        header, tensors = read_folder(source, "plan")
        try:
            take(header, "the file", ("name", "model", "steps"))
            model = fingerprint_from_json(header["model"])
            given, controllers = expect(header["steps"], list, "steps"), dict[int, Gains]()
            steps = tuple(step_from_json(step, tensors, model, controllers) for step in given)
            if not steps:
                raise ValueError("a plan needs at least one step, got none")
            return Plan._of(check_name(header["name"], "plan name"), steps)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"plan.json: {error}") from None
