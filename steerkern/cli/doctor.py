"""``steerkern doctor``: what runs here, what does not, and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from .options import Json
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = {
    "plots": ("matplotlib",),
    "gguf": ("gguf",),
    "bench": ("pytest", "pytest_benchmark"),
    "test": ("pytest", "xdist", "pytest_benchmark", "hypothesis", "matplotlib", "gguf"),
    "peers": ("nnsight", "pyvene", "transformer_lens", "llm_steer", "peft"),
    "dev": ("ruff", "mypy", "build"),
}
"""Modules of every extra of pyproject.toml."""


def doctor(as_json: Json = False) -> Outcome:
    """Say why each backend is or is not active, and which versions, compiler and extras are here."""
    import torch

    from ..ops import cpu, dispatch
    from ..report import versions

    reasons = dispatch.backends()
    isas = None if cpu.unusable() else _isas()
    document: dict[str, Any] = {
        "command": "doctor",
        "backends": {name: {"active": not reason, "reason": reason or None} for name, reason in reasons.items()},
        "automatic": "reference" if reasons["cpu"] else "cpu",
        "extension": {"built": importlib.util.find_spec("steerkern._C") is not None, "isas": isas},
        "versions": versions(),
        "cuda": {"available": torch.cuda.is_available(), "built_for": torch.version.cuda},
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "compiler": _compiler(),
        },
        "extras": {name: _extra(name, modules) for name, modules in EXTRAS.items()},
    }
    return Outcome(document, lambda console: _show(document, console))


def _isas() -> dict[str, Any]:
    from .. import _C

    return {"active": _C.isa(), "supported": _C.supported_isas()}


def _compiler() -> str | None:
    """First line of what the C++ compiler says of itself, which is needed only to build the extension."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name.split()[0])
        if path is not None:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
            return (said.splitlines() or [path])[0]
    return None


def _extra(name: str, modules: tuple[str, ...]) -> dict[str, Any]:
    missing = [module for module in modules if not _installed(module)]
    return {"missing": missing, "install": f"pip install 'steerkern[{name}]'" if missing else None}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        return False  # a module without a spec was put into sys.modules by hand


def _show(document: dict[str, Any], console: Console) -> None:
    from ..report import Column, Row, Table

    isas = document["extension"]["isas"]
    rows: list[Row] = []
    for name, state in document["backends"].items():
        note = state["reason"] or ""
        if name == "cpu" and isas is not None:
            note = f"{isas['active']}; this machine and build have {', '.join(isas['supported'])}"
        rows.append({"name": name, "active": state["active"], "note": note})
    columns = (Column("name", "backend"), Column("active", "active"), Column("note", "why"))
    console.print(Table("backends", "Backends", columns, tuple(rows)).render())
    machine, cuda = document["machine"], document["cuda"]
    facts: list[Row] = [{"what": what, "is": version} for what, version in document["versions"].items()]
    facts += [
        {"what": "platform", "is": machine["platform"]},
        {"what": "threads", "is": f"torch uses {machine['torch_threads']} of {machine['cores']} cores"},
        {"what": "compiler", "is": machine["compiler"] or "none found; only building the extension needs one"},
        {
            "what": "extension",
            "is": "built" if document["extension"]["built"] else "not built: STEERKERN_BUILD=cpu pip install",
        },
        {
            "what": "CUDA",
            "is": "available" if cuda["available"] else f"no device (torch built for {cuda['built_for'] or 'CPU'})",
        },
    ]
    console.print(Table("machine", "Machine", (Column("what", ""), Column("is", "")), tuple(facts)).render())
    extras: list[Row] = [
        {
            "name": name,
            "state": "complete" if not e["missing"] else f"no {', '.join(e['missing'])}",
            "install": e["install"],
        }
        for name, e in document["extras"].items()
    ]
    columns = (Column("name", "extra"), Column("state", "state"), Column("install", "install with"))
    console.print(Table("extras", "Optional extras", columns, tuple(extras)).render())
