"""``steerkern serve``: transformers' OpenAI-compatible server on a steered model."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import ORGANISM
from .outcome import Outcome


def serve(
    context: typer.Context,
    plan: Annotated[list[str], typer.Option(help="Folder or hub id of a plan; may be repeated.")],
) -> Outcome:
    """Everything else is for transformers serve: MODEL --continuous-batching --port 8000 ... (see its own --help)."""
    from ..integrations.transformers_serve import serve as run
    from ..plan import Plan

    plans = [Plan.from_pretrained(folder) for folder in plan]
    run(plans, list(map(_model, context.args)))
    return Outcome(None, lambda console: None)


def _model(argument: str) -> str:
    """The bundled model by its name, everything else as it is."""
    if argument.partition(":")[0] != ORGANISM:
        return argument
    from .. import organism

    kind = argument.partition(":")[2]
    return str(organism.path(kind or "planted"))  # type: ignore[arg-type]
