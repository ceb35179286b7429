"""baukit's way: one object that hooks modules by name and passes their outputs through one function.

baukit itself is not on PyPI; this is the pattern of its ``TraceDict(..., edit_output=f)``, written here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter, Rows, Steered, change, generate, layers_of


class Trace(contextlib.ExitStack):
    """Hooks on named modules; ``edit(output, name)`` replaces what each returns, and the last outputs are kept."""

    def __init__(self, model: nn.Module, names: Sequence[str], edit: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self.outputs: dict[str, Tensor] = {}
        for name in names:
            hook = self._hook(name, edit)
            self.callback(model.get_submodule(name).register_forward_hook(hook).remove)

    def _hook(self, name: str, edit: Callable[[Tensor, str], Tensor]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.outputs[name] = edit(output, name)
            return self.outputs[name]

        return hook


@contextlib.contextmanager
def steer(model: Any, rows: Rows) -> Iterator[Steered]:
    """One function for all blocks, which looks its edit up by name."""
    changes = {f"model.layers.{layer}": change(rows, layer) for layer in layers_of(rows)}
    with Trace(model, list(changes), lambda output, name: changes[name](output)):
        yield Steered(model, lambda inputs, tokens: generate(model, inputs, tokens))


ADAPTER = Adapter(
    "baukit-style hooks",
    ("add", "ablate", "clamp", "rank 4"),
    steer,
    per_row=True,
    note="the pattern, written here: the package is not on PyPI",
)
