"""Plans as JSON and tensors: written by ``Plan.save_pretrained``, read with every value checked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .artifacts import Fingerprint
from .directions import SITES
from .edits import KINDS, Edit, Gate, Rows
from .steps import Step, Tokens, parse_layers


def step_to_json(step: Step, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    edits = []
    for i, edit in enumerate(step.edits):
        rows = []
        for layer, r in edit.rows.items():
            key = f"{index}.{i}.{'any' if layer is None else layer}"
            tensors[key] = r.vectors
            maps = {name: [_number(x) for x in getattr(r, name)] for name in ("norms", "alpha", "beta", "lo", "hi")}
            rows.append({"layer": layer, "vectors": key, **maps})
        record: dict[str, Any] = {"kind": edit.kind, "orthonormalised": edit.orthonormalised, "rows": rows}
        if edit.gate is not None:
            key = f"{index}.{i}.gate"
            tensors[key] = edit.gate.unit
            record["gate"] = {"unit": key, "lo": _number(edit.gate.lo), "hi": _number(edit.gate.hi), "cosine": edit.gate.cosine}
        edits.append(record)
    tokens = step.tokens
    scope = {"phase": tokens.phase, "positions": tokens.positions, "start": tokens.start, "stop": tokens.stop}
    return {
        "layers": step.layers,
        "site": step.site,
        "tokens": scope,
        "keep_norm": step.keep_norm,
        "scale": step.scale,
        "edits": edits,
    }


def step_from_json(record: Any, tensors: dict[str, Tensor], model: Fingerprint | None) -> Step:
    edits = tuple(_edit_from_json(edit, tensors, model) for edit in take_list(record, "edits"))
    if not edits:
        raise ValueError("a step needs at least one edit")
    if record["site"] not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {record['site']!r}")
    scope = record["tokens"]
    positions = scope["positions"]
    tokens = Tokens(scope["phase"], None if positions is None else tuple(positions), scope["start"], scope["stop"])
    scale = _parse(record["scale"])
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    layers = None if record["layers"] is None else parse_layers(take_list(record, "layers"))
    return Step(edits, layers, record["site"], tokens, bool(record["keep_norm"]), scale)


def _edit_from_json(record: Any, tensors: dict[str, Tensor], model: Fingerprint | None) -> Edit:
    if record["kind"] not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {record['kind']!r}")
    rows: dict[int | None, Rows] = {}
    for r in take_list(record, "rows"):
        layer, vectors = r["layer"], _tensor(tensors, r["vectors"], 2)
        if layer is not None and (type(layer) is not int or layer < 0):
            raise ValueError(f"layer must be a number from 0 or null, got {layer!r}")
        if layer in rows:
            raise ValueError(f"layer {layer} is listed twice")
        maps = {name: tuple(_parse(x) for x in take_list(r, name)) for name in ("norms", "alpha", "beta", "lo", "hi")}
        if any(len(m) != vectors.shape[0] for m in maps.values()):
            raise ValueError(f"{r['vectors']!r} has {vectors.shape[0]} rows, its map has {[len(m) for m in maps.values()]}")
        if not all(map(math.isfinite, maps["norms"] + maps["alpha"] + maps["beta"])):
            raise ValueError("alpha, beta and norms must be finite")
        if any(math.isnan(x) for x in maps["lo"] + maps["hi"]) or any(lo > hi for lo, hi in zip(maps["lo"], maps["hi"], strict=True)):
            raise ValueError("lo and hi must be an interval")
        rows[layer] = Rows(vectors, **maps)
    if not rows or (None in rows and len(rows) > 1):
        raise ValueError("rows must hold one set for any layer, or one per layer")
    if len({r.vectors.shape for r in rows.values()}) > 1:
        raise ValueError("the vectors of an edit must have one shape at every layer")
    edit = Edit(record["kind"], rows, None, model, bool(record["orthonormalised"]))
    if edit.kind == "rotate" and edit.rank != 2:
        raise ValueError(f"rotate needs two vectors, got {edit.rank}")
    if model is not None and edit.width != model.width:
        raise ValueError(f"vectors have width {edit.width}, the model is {model}")
    gate = record.get("gate")
    if gate is None:
        return edit
    unit = _tensor(tensors, gate["unit"], 1)
    return replace(edit, gate=Gate(unit, _parse(gate["lo"]), _parse(gate["hi"]), bool(gate["cosine"])))


def _number(x: float) -> float | str:
    """JSON has no infinity: write it as a string."""
    return x if math.isfinite(x) else ("inf" if x > 0 else "-inf")


def _parse(x: Any) -> float:
    if x in ("inf", "-inf"):
        return float(x)
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise ValueError(f"expected a number, got {x!r}")
    return float(x)


def take_list(record: Any, key: str) -> list[Any]:
    value = record[key]
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, got {type(value).__name__}")
    return value


def _tensor(tensors: dict[str, Tensor], key: Any, dims: int) -> Tensor:
    tensor = tensors.get(key) if isinstance(key, str) else None
    if tensor is None or tensor.dim() != dims or torch.any(tensor.norm(dim=-1) == 0):
        raise ValueError(f"directions.safetensors has no nonzero {dims}-dimensional tensor {key!r}")
    return tensor
