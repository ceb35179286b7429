"""``steerkern inspect``: what a folder holds, or where a model can be edited."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Dtype, Json, Model, load
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from ..directions import Directions
    from ..plan import Plan
    from ..runtime.blocks import BlockSums
    from ..runtime.sites import Anatomy


def inspect(
    source: Annotated[
        str | None, typer.Argument(help="Folder or hub id of a plan or of directions.", show_default=False)
    ] = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> Outcome:
    """Show a plan's steps, directions per layer, or (with --model) the sites of a model and which are fused."""
    if (source is None) == (model is None):
        raise ValueError("give either a folder (or hub id) to look into, or --model for the sites of a model")
    if source is None:
        from ..runtime.sites import examine

        loaded = load(model, dtype, device, with_tokenizer=False)
        anatomy = examine(loaded.model)
        return Outcome(
            _anatomy_document(loaded.source, anatomy), lambda console: _show_anatomy(loaded.source, anatomy, console)
        )
    found = _read(source)
    from ..plan import Plan

    if isinstance(found, Plan):
        plan = found
        return Outcome(_plan_document(plan), lambda console: _show_plan(plan, console))
    directions = found
    return Outcome(directions_document(directions), lambda console: show_directions(directions, console))


def _read(source: str) -> Plan | Directions:
    """A plan or directions, told apart by the JSON file in the folder."""
    from ..directions import Directions
    from ..errors import ArtifactError
    from ..plan import Plan

    folder = Path(source)
    if folder.is_dir():
        if (folder / "plan.json").exists():
            return Plan.from_pretrained(source)
        if (folder / "directions.json").exists():
            return Directions.from_pretrained(source)
        raise ArtifactError(f"{folder} has neither plan.json nor directions.json")
    try:
        return Plan.from_pretrained(source)
    except ArtifactError as error:
        if "has no plan.json" not in str(error):
            raise
        return Directions.from_pretrained(source)


def directions_document(directions: Directions) -> dict[str, Any]:
    """Directions as JSON values, without the vectors."""
    return {
        "kind": "directions",
        "version": 1,
        "name": directions.name,
        "site": directions.site,
        "width": directions.width,
        "model": None if directions.model is None else directions.model._asdict(),
        "layers": [{"layer": layer, "norm": direction.norm} for layer, direction in directions.items()],
        "provenance": dict(directions.provenance),
    }


def show_directions(directions: Directions, console: Console) -> None:
    """Print name, model, provenance and the norm of every layer."""
    from ..report import Column, Row, Table

    console.print(f"directions {directions.name!r}, format version 1", style="bold", markup=False, highlight=False)
    _facts(console, {"site": directions.site, "width": directions.width, "made for": directions.model or "any model"})
    _facts(console, directions.provenance)
    rows: list[Row] = [{"layer": layer, "norm": direction.norm} for layer, direction in directions.items()]
    columns = (Column("layer", "layer"), Column("norm", "norm (residual units)", ".4g"))
    console.print(Table("layers", "Layers", columns, tuple(rows)).render())


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "kind": "plan",
        "version": 1,
        "name": plan.name,
        "width": plan.width,
        "model": None if plan.model is None else plan.model._asdict(),
        "steps": [
            {
                "site": step.site,
                "layers": "all" if step.layers is None else list(step.layers),
                "tokens": {
                    "phase": step.tokens.phase,
                    "positions": step.tokens.positions,
                    "start": step.tokens.start,
                    "stop": step.tokens.stop,
                },
                "keep_norm": step.keep_norm,
                "scale": step.scale,
                "edits": [
                    {
                        "kind": edit.kind,
                        "rank": edit.rank,
                        "gated": edit.gate is not None,
                        "orthonormalised": edit.orthonormalised,
                        "norms": {str("any" if at is None else at): list(rows.norms) for at, rows in edit.rows.items()},
                    }
                    for edit in step.edits
                ],
            }
            for step in plan.steps
        ],
    }


def _show_plan(plan: Plan, console: Console) -> None:
    from ..report import Column, Row, Table
    from ..steps import describe

    console.print(f"plan {plan.name!r}, format version 1", style="bold", markup=False, highlight=False)
    _facts(console, {"width": plan.width, "made for": plan.model or "any model"})
    rows: list[Row] = []
    for number, step in enumerate(plan.steps):
        for edit in step.edits:
            for layer, vectors in edit.rows.items():
                norms = ", ".join(f"{norm:.4g}" for norm in vectors.norms)
                rows.append(
                    {"step": number, "edit": edit.kind, "layer": "any" if layer is None else str(layer), "norms": norms}
                )
    for number, step in enumerate(plan.steps):
        console.print(f"step {number}: {describe(step)}", markup=False, highlight=False)
    columns = (
        Column("step", "step"),
        Column("edit", "edit"),
        Column("layer", "vectors of layer"),
        Column("norms", "norms as given"),
    )
    console.print(Table("vectors", "Vectors", columns, tuple(rows)).render())


def _site_rows(anatomy: Anatomy) -> list[dict[str, str | None]]:
    return [
        {
            "site": str(found.site),
            "edit": "in its own kernel" if found.fused is None else "in the norm's kernel",
            "norm": None
            if found.fused is None
            else f"{type(found.fused.module).__name__} ({found.fused.norm.name.lower()})",
            "reason": found.reason or None,
        }
        for found in anatomy.sites
    ]


def _anatomy_document(source: str, anatomy: Anatomy) -> dict[str, Any]:
    rows = _site_rows(anatomy)
    return {
        "kind": "model",
        "source": source,
        "model": anatomy.fingerprint._asdict(),
        "dtype": str(anatomy.dtype).removeprefix("torch."),
        "device": str(anatomy.device),
        "sites": [
            {"site": row["site"], "fused": found.fused is not None, "norm": row["norm"], "reason": row["reason"]}
            for row, found in zip(rows, anatomy.sites, strict=True)
        ],
        "norms": len(anatomy.norms),
        "sums": [{"layer": s.layer, "norms": list(s.norms), "reason": s.reason or None} for s in _sums(anatomy)],
    }


def _sums(anatomy: Anatomy) -> tuple[BlockSums, ...]:
    from ..ops import dispatch
    from ..runtime.blocks import find_sums

    backend = dispatch.resolve(None, anatomy.device, anatomy.dtype)
    return find_sums(anatomy.blocks, (spec.module for spec in anatomy.norms), backend)


def _show_anatomy(source: str, anatomy: Anatomy, console: Console) -> None:
    from ..report import Column, Table

    fused = sum(found.fused is not None for found in anatomy.sites)
    console.print(f"{source}: {anatomy.fingerprint}", style="bold", markup=False, highlight=False)
    console.print(
        f"{fused} of {len(anatomy.sites)} sites are fused; {len(anatomy.norms)} norms can be replaced", highlight=False
    )
    sums = _sums(anatomy)
    reasons = ", ".join(sorted({block.reason for block in sums if block.reason}))
    console.print(
        f"the residual sums of {sum(bool(block.norms) for block in sums)} of {len(sums)} blocks are made by their norms"
        + (f" (others: {reasons})" if reasons else ""),
        highlight=False,
    )
    columns = (
        Column("site", "site"),
        Column("edit", "edited"),
        Column("norm", "norm"),
        Column("reason", "why not fused"),
    )
    console.print(Table("sites", "Sites", columns, tuple(_site_rows(anatomy))).render())


def _facts(console: Console, facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        console.print(f"  {key.replace('_', ' ')}: {_brief(value)}", markup=False, highlight=False, soft_wrap=True)


def _brief(value: Any) -> str:
    """A value of a provenance in one line; of a hash its first 12 digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items() if item not in ({}, [], None)) or "none"
    if isinstance(value, list):
        return ", ".join(map(_brief, value)) or "none"
    text = "none" if value is None else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text
