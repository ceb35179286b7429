"""``transformers serve`` with steered models: plans are attached to every model when the server has loaded it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import SteerkernError
from ..plan import Plan
from ..runtime.session import Session, steer

INSTALL = "pip install 'transformers[serving]>=5.17'"


@contextlib.contextmanager
def steered_models(plans: Sequence[Plan]) -> Iterator[list[Session]]:
    """For as long as it lasts, models that transformers' server loads in this process are steered by ``plans``.

    Every request has every plan, with and without continuous batching. Yields the sessions, one per loaded model.

    Raises:
        SteerkernError: transformers' server is not installed.
    """
    try:
        from transformers.cli.serving.model_manager import ModelManager
    except ImportError as error:
        raise SteerkernError(f"transformers' server is not installed ({error}): {INSTALL}") from None
    sessions: list[Session] = []
    stock = ModelManager._load_model

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = stock(self, *args, **kwargs)
        sessions.append(steer(model, plans, silent="ignore"))
        return model

    ModelManager._load_model = load
    try:
        yield sessions
    finally:
        ModelManager._load_model = stock
        for session in sessions:
            session.detach()


def serve(plans: Sequence[Plan], arguments: Sequence[str]) -> None:
    """Run ``transformers serve`` with its own ``arguments`` until it is stopped.

    Raises:
        SteerkernError: transformers' server is not installed.
    """
    with steered_models(plans):
        from transformers.cli.transformers import app

        app(["serve", *arguments], standalone_mode=False)
