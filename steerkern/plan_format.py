"""Plans as JSON and tensors: written by ``Plan.save_pretrained``, read with every value checked.

What a value may be is said by the classes themselves (:class:`~steerkern.edits.Edit`, :class:`~steerkern.steps.Step`
and their parts); this file checks the types and keys that JSON leaves open.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

from torch import Tensor

from .artifacts import Fingerprint, expect, take
from .directions import check_layer
from .edits import MAP, Edit, Gate, Rows
from .steps import Step, Tokens, parse_layers

_NUMBERS = ("norms", *MAP)


def step_to_json(step: Step, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The record of step number ``index``; its vectors are put into ``tensors``."""
    edits = []
    for i, edit in enumerate(step.edits):
        rows = []
        for layer, r in edit.rows.items():
            key = _store(tensors, f"{index}.{i}.{'any' if layer is None else layer}", r.vectors)
            maps = {name: [_number(x) for x in getattr(r, name)] for name in _NUMBERS}
            rows.append({"layer": layer, "vectors": key, **maps})
        record: dict[str, Any] = {"kind": edit.kind, "orthonormalised": edit.orthonormalised, "rows": rows}
        if edit.gate is not None:
            key = _store(tensors, f"{index}.{i}.gate", edit.gate.unit)
            lo, hi = _number(edit.gate.lo), _number(edit.gate.hi)
            record["gate"] = {"unit": key, "lo": lo, "hi": hi, "cosine": edit.gate.cosine}
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


def step_from_json(record: object, tensors: dict[str, Tensor], model: Fingerprint | None) -> Step:
    """Read what :func:`step_to_json` wrote.

    Raises:
        TypeError, ValueError: one sentence about the first value that is not allowed.
    """
    found = take(record, "a step", ("layers", "site", "tokens", "keep_norm", "scale", "edits"))
    edits = tuple(_edit_from_json(edit, tensors, model) for edit in expect(found["edits"], list, "edits"))
    tokens = Tokens(**take(found["tokens"], "tokens", ("phase", "positions", "start", "stop")))
    layers = None if found["layers"] is None else parse_layers(expect(found["layers"], list, "layers"))
    keep_norm = expect(found["keep_norm"], bool, "keep_norm")
    return Step(edits, layers, found["site"], tokens, keep_norm, _parse(found["scale"], "scale"))


def _edit_from_json(record: object, tensors: dict[str, Tensor], model: Fingerprint | None) -> Edit:
    found = take(record, "an edit", ("kind", "orthonormalised", "rows"), ("gate",))
    rows: dict[int | None, Rows] = {}
    for item in expect(found["rows"], list, "rows"):
        r = take(item, "rows", ("layer", "vectors", *_NUMBERS))
        layer = None if r["layer"] is None else check_layer(r["layer"])
        if layer in rows:
            raise ValueError(f"layer {layer} is listed twice")
        maps = {name: tuple(_parse(x, name) for x in expect(r[name], list, name)) for name in _NUMBERS}
        rows[layer] = Rows(_find(tensors, r["vectors"]), **maps)
    gate = None
    if "gate" in found:
        g = take(found["gate"], "gate", ("unit", "lo", "hi", "cosine"))
        cosine = expect(g["cosine"], bool, "cosine")
        gate = Gate(_find(tensors, g["unit"]), _parse(g["lo"], "lo"), _parse(g["hi"], "hi"), cosine)
    return Edit(found["kind"], rows, gate, model, expect(found["orthonormalised"], bool, "orthonormalised"))


def _number(x: float) -> float | str:
    """JSON has no infinity: write it as a string."""
    return x if math.isfinite(x) else ("inf" if x > 0 else "-inf")


def _parse(x: object, what: str) -> float:
    if x in ("inf", "-inf"):
        return float(x)
    if type(x) is int and abs(x) < 1 << 128:  # beyond that float32 has no such number, and beyond 1 << 1024 no float
        return float(x)
    if type(x) is float:
        return x
    raise ValueError(f"{what} must be a number, got {reprlib.repr(x)}")


def _store(tensors: dict[str, Tensor], key: str, tensor: Tensor) -> str:
    """Put ``tensor`` under ``key``, or return the key that it is stored under already."""
    stored = next((name for name, held in tensors.items() if held is tensor), key)
    tensors[stored] = tensor
    return stored


def _find(tensors: dict[str, Tensor], key: object) -> Tensor:
    if not isinstance(key, str) or key not in tensors:
        raise ValueError(f"directions.safetensors has no tensor {reprlib.repr(key)}")
    return tensors[key]
