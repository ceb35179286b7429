"""pyvene: interventions declared per layer and component, run by ``IntervenableModel.generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .adapter import Adapter, Change, Inputs, Rows, Steered, change, directions, kind_of, layers_of, strength_of


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """Its own ``AdditionIntervention``; for other edits an intervention written by the user, as its tutorials do.

    ``unit_locations=None`` with ``intervene_on_prompt=True`` reaches every position of the prompt and of what follows;
    the defaults of ``generate`` reach the generated tokens only.
    """
    import pyvene

    width = model.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 1,
            "intervention": _intervention(rows, layer, width),
        }
        for layer in layers_of(rows)
    ]
    intervened = pyvene.IntervenableModel(representations, model)

    def run(inputs: Inputs, tokens: int) -> None:
        intervened.generate(
            dict(inputs),
            unit_locations=None,
            intervene_on_prompt=True,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )

    yield Steered(model, run)


def _intervention(rows: Rows, layer: int, width: int) -> Any:
    import pyvene

    if kind_of(rows) == "add" and len(rows) == 1:
        vector = strength_of(rows) * directions(rows, layer)[0]
        return pyvene.AdditionIntervention(embed_dim=width, source_representation=vector)

    class Written(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):  # type: ignore[misc]
        edit: Change = staticmethod(change(rows, layer))

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
            return type(self).edit(base)

    return Written(embed_dim=width)


ADAPTER = Adapter("pyvene", ("add", "ablate", "clamp", "rank 4"), steer, package="pyvene", per_row=True)
