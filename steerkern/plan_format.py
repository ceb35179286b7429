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
from .decisions import Condition, Gains, Latch, Read, Term
from .directions import check_layer, check_site
from .edits import MAP, Edit, Gate, Rows
from .steps import Step, Tokens, parse_layers

_NUMBERS = ("norms", *MAP)
_EVENTS = ("after", "until", "first", "every")


def step_to_json(step: Step, index: int, tensors: dict[str, Tensor], controllers: list[Gains]) -> dict[str, Any]:
    """The record of step number ``index``; its vectors are put into ``tensors``, its controller into ``controllers``.

    Steps that share a controller store it once.
    """
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
    scope.update({k: v for k in _EVENTS if (v := getattr(tokens, k)) != getattr(Tokens, k)})
    decided: dict[str, Any] = {}
    if step.latch is not None:
        decided["latch"] = _latch_to_json(step.latch, index, tensors)
    if step.controller is not None:
        record, weights = step.controller.to_record()
        shared = next((i for i, held in enumerate(controllers) if held is step.controller), len(controllers))
        if shared == len(controllers):
            controllers.append(step.controller)
            tensors.update({f"controller.{shared}.{name}": weight for name, weight in weights.items()})
        decided["controller"] = {"number": shared, "record": record, "tensors": sorted(weights)}
    return {
        "layers": step.layers,
        "site": step.site,
        "tokens": scope,
        "keep_norm": step.keep_norm,
        "scale": step.scale,
        "edits": edits,
        **decided,
    }


def step_from_json(
    record: object, tensors: dict[str, Tensor], model: Fingerprint | None, controllers: dict[int, Gains]
) -> Step:
    """Read what :func:`step_to_json` wrote; ``controllers`` collects those of the plan by number.

    Raises:
        TypeError, ValueError: one sentence about the first value that is not allowed.
    """
    required = ("layers", "site", "tokens", "keep_norm", "scale", "edits")
    found = take(record, "a step", required, ("latch", "controller"))
    edits = tuple(_edit_from_json(edit, tensors, model) for edit in expect(found["edits"], list, "edits"))
    tokens = Tokens(**take(found["tokens"], "tokens", ("phase", "positions", "start", "stop"), _EVENTS))
    layers = None if found["layers"] is None else parse_layers(expect(found["layers"], list, "layers"))
    keep_norm = expect(found["keep_norm"], bool, "keep_norm")
    scale = _parse(found["scale"], "scale")
    latch = _latch_from_json(found["latch"], tensors) if "latch" in found else None
    controller = _controller_from_json(found["controller"], tensors, controllers) if "controller" in found else None
    return Step(edits, layers, found["site"], tokens, keep_norm, scale, latch, controller)


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


def _latch_to_json(latch: Latch, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    conditions = []
    for i, condition in enumerate(latch.conditions):
        terms = [
            {
                "layer": term.read.layer,
                "site": term.read.site,
                "token": term.read.token,
                "vector": _store(tensors, f"{index}.latch.{i}.{j}", term.vector),
                "weight": term.weight,
                "measure": term.measure,
            }
            for j, term in enumerate(condition.terms)
        ]
        conditions.append({"terms": terms, "lo": _number(condition.lo), "hi": _number(condition.hi)})
    return {"rule": latch.rule, "conditions": conditions}


def _latch_from_json(record: object, tensors: dict[str, Tensor]) -> Latch:
    found = take(record, "a latch", ("rule", "conditions"))
    conditions = []
    for item in expect(found["conditions"], list, "conditions"):
        c = take(item, "a condition", ("terms", "lo", "hi"))
        terms = []
        for one in expect(c["terms"], list, "terms"):
            t = take(one, "a term", ("layer", "site", "token", "vector", "weight", "measure"))
            read = Read(check_layer(t["layer"]), check_site(t["site"]), t["token"])
            terms.append(Term(read, _find(tensors, t["vector"]), _parse(t["weight"], "weight"), t["measure"]))
        conditions.append(Condition(tuple(terms), _parse(c["lo"], "lo"), _parse(c["hi"], "hi")))
    return Latch(tuple(conditions), found["rule"])


def _controller_from_json(record: object, tensors: dict[str, Tensor], controllers: dict[int, Gains]) -> Gains:
    from .controller.network import Controller

    found = take(record, "a controller", ("number", "record", "tensors"))
    number = check_layer(found["number"])
    if number not in controllers:
        names = expect(found["tensors"], list, "tensors of the controller")
        weights = {str(name): _find(tensors, f"controller.{number}.{name}") for name in names}
        controllers[number] = Controller.from_record(found["record"], weights)
    return controllers[number]


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
