"""HTTP: plans, receipts and metrics of an OpenAI-compatible server.

======  =============================  ==============================================================
GET     ``/v1/steerkern/plans``        the plans and what they do
POST    ``/v1/steerkern/plans``        load one: ``{"name": ..., "path": ..., "scale": ...}``
PATCH   ``/v1/steerkern/plans/NAME``   change its strength: ``{"scale": ...}``
DELETE  ``/v1/steerkern/plans/NAME``   unload it
======  =============================  ==============================================================

The routes begin with ``/v1``, so they ask for the server's key where it has one. A request with
``"vllm_xargs": {"steerkern_receipt": 1}`` finds in its response, under ``steerkern``, what was written of it; a
streamed one in a last chunk. ``/metrics`` counts plans, steered requests and steered rows.
"""

from __future__ import annotations

import json
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, ConfigDict

from ...errors import SteerkernError
from . import hooks
from .admission import Admission
from .asked import RECEIPT
from .library import UnknownPlan
from .management import Management

router = APIRouter(prefix="/v1/steerkern")


class Load(BaseModel):
    """A plan to load."""

    model_config = ConfigDict(extra="forbid")
    name: str
    path: str | None = None
    scale: float = 1.0


class Rescale(BaseModel):
    """A new strength."""

    model_config = ConfigDict(extra="forbid")
    scale: float


@router.get("/plans")
async def list_plans(raw: Request) -> dict[str, Any]:
    """The plans that requests can ask for."""
    management = _management(raw)
    with _Answered():
        return {"plans": [management.describe(name) for name in sorted(management.library.shelves)]}


@router.post("/plans", status_code=201)
async def load_plan(body: Load, raw: Request) -> dict[str, Any]:
    """Load a plan."""
    management = _management(raw)
    with _Answered():
        await management.load(body.name, body.path, body.scale)
        return management.describe(body.name)


@router.patch("/plans/{name}")
async def rescale_plan(name: str, body: Rescale, raw: Request) -> dict[str, Any]:
    """Change the strength of a plan for requests to come."""
    management = _management(raw)
    with _Answered():
        await management.rescale(name, body.scale)
        return management.describe(name)


@router.delete("/plans/{name}")
async def unload_plan(name: str, raw: Request) -> dict[str, Any]:
    """Unload a plan."""
    management = _management(raw)
    with _Answered():
        await management.unload(name)
        return {"unloaded": name}


def _management(raw: Request) -> Management:
    management: Management | None = getattr(raw.app.state, "steerkern", None)
    if management is None:
        raise HTTPException(503, "this server has no engine whose plans could be managed")
    return management


class _Answered:
    """Turns what the library raises into answers."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for cls, status in ((UnknownPlan, 404), (PermissionError, 403), ((SteerkernError, ValueError, TypeError), 400)):
            if isinstance(error, cls):
                raise HTTPException(status, str(error)) from None


class Endpoints:
    """What vLLM asks for by its entry point ``vllm.endpoint_plugins``."""

    name = "steerkern"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, the receipts of responses, and the refreshing of metrics."""
        app.include_router(router)
        app.add_middleware(Metrics, state=app.state)
        for module, owner, name in _SERVING:
            hooks.wrap(module, owner, name, _with_receipt)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Let the routes reach the engine."""
        if engine_client is not None:
            admission: Admission = engine_client.input_processor.__dict__[hooks.HELD]
            admission.receipts = admission.library is not None
            state.steerkern = Management(engine_client, admission)
            engine_client.__dict__[hooks.HELD] = state.steerkern


_SERVING = (
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "create_completion"),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
)


async def _with_receipt(stock: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """A response that says what was written of its request, where it was asked to."""
    management: Management | None = serving.engine_client.__dict__.get(hooks.HELD)
    asked = request.vllm_xargs or {}
    if not asked.get(RECEIPT) or management is None or management.admission.library is None:
        return await stock(serving, request, *args, **kwargs)
    name = uuid.uuid4().hex
    request.vllm_xargs = {**asked, RECEIPT: name}
    response = await stock(serving, request, *args, **kwargs)
    if hasattr(response, "__aiter__"):
        return _streamed(response, management, name)
    if hasattr(response, "choices"):
        response.steerkern = await management.receipt(name)
    return response


async def _streamed(chunks: AsyncIterator[str], management: Management, name: str) -> AsyncIterator[str]:
    """A stream with one chunk more at its end, without a choice, as the one that gives the usage."""
    last: dict[str, Any] = {}
    async for chunk in chunks:
        data = chunk.removeprefix("data: ").strip()
        if data == "[DONE]":
            receipt = {**last, "choices": [], "steerkern": await management.receipt(name)}
            yield f"data: {json.dumps(receipt)}\n\n"
        elif data.startswith("{"):
            head = json.loads(data)
            last = {key: head[key] for key in ("id", "object", "created", "model") if key in head}
        yield chunk


class Metrics:
    """Asks the workers for their counts when ``/metrics`` is read."""

    def __init__(self, app: Any, state: Any) -> None:
        self.app, self.state = app, state
        self.plans = Gauge("steerkern:plans_loaded", "Steering plans that requests can ask for.")
        self.rows = Counter("steerkern:steered_rows", "Rows of the residual stream that a plan wrote.")
        self.requests = Counter("steerkern:steered_requests", "Requests that some plan steered.")
        self._before: dict[str, int] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; one for the metrics after they were brought up to date."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await self._refresh()
        await self.app(scope, receive, send)

    async def _refresh(self) -> None:
        management: Management | None = getattr(self.state, "steerkern", None)
        if management is None or management.admission.library is None:
            return
        counts = await management.summary()
        added = {name: max(0, count - self._before.get(name, 0)) for name, count in counts.items()}
        self._before = counts
        self.plans.set(len(management.library.shelves))
        self.rows.inc(added["rows"])
        self.requests.inc(added["requests"])
