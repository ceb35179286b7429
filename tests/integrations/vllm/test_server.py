"""The routes of a server, its receipts and metrics, on an engine that only passes calls on."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steerkern as sk
from steerkern.integrations.vllm.admission import Admission
from steerkern.integrations.vllm.remote import VERBS
from steerkern.integrations.vllm.settings import Settings
from steerkern.integrations.vllm.worker import Steering
from tests.integrations.vllm.conftest import vector
from tests.integrations.vllm.engine import Model, config
from tests.integrations.vllm.test_worker import Examine

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import fastapi
import prometheus_client
from fastapi.testclient import TestClient

from steerkern.integrations.vllm import hooks, server


class Engine:
    """Two workers behind an API process."""

    def __init__(self, folder: Path, anatomy: Any, **settings: Any) -> None:
        given = {"plans": {"add": str(folder / "add")}, "folder": str(folder), **settings}
        self.vllm_config = config(given)
        admission = Admission.of(self.vllm_config)
        self.input_processor = SimpleNamespace()
        self.input_processor.__dict__[hooks.HELD] = admission
        plans = [sk.Plan.from_pretrained(folder / "add").named("add")]
        self.workers = [
            Steering(
                Settings(**given), anatomy, plans, tokens=32, requests=4, device=torch.device("cpu"),
                dtype=torch.float32,
            )
            for _ in range(2)
        ]  # fmt: skip

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "steerkern"
        return [VERBS[args[0]](worker, *args[1:]) for worker in self.workers]


@pytest.fixture
def engine(folder: Path, model: Model, examined: Examine) -> Engine:
    (folder / "other").mkdir()
    sk.Plan(sk.add(vector(1)[:8]), layers=1, name="narrow").save_pretrained(folder / "narrow")
    return Engine(folder, examined(model))


@pytest.fixture
def client(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(server, "_SERVING", ())
    registry = prometheus_client.CollectorRegistry()
    for name in ("Gauge", "Counter"):
        made = getattr(prometheus_client, name)
        monkeypatch.setattr(server, name, lambda *args, made=made: made(*args, registry=registry))
    app = fastapi.FastAPI()
    endpoints = server.Endpoints()
    endpoints.attach_router(app)
    app.mount("/metrics", prometheus_client.make_asgi_app(registry))
    asyncio.run(endpoints.init_state(engine, app.state, Namespace()))
    with TestClient(app) as made:
        yield made


def names(client: TestClient) -> list[str]:
    return [plan["name"] for plan in client.get("/v1/steerkern/plans").json()["plans"]]


def test_plans_come_change_and_go(client: TestClient, engine: Engine) -> None:
    assert names(client) == ["add"]
    made = client.post("/v1/steerkern/plans", json={"name": "soft", "path": "ablate", "scale": 0.5})
    assert made.status_code == 201
    assert made.json()["steps"] == ["ablate at resid_pre[all], decode"]
    assert all(made.json()["digest"] in worker.plans for worker in engine.workers)
    assert client.patch("/v1/steerkern/plans/soft", json={"scale": 2}).json()["scale"] == 2.0
    assert names(client) == ["add", "soft"]
    assert client.delete("/v1/steerkern/plans/soft").status_code == 200
    assert names(client) == ["add"]
    assert all(len(worker.plans) == 1 for worker in engine.workers)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "sentence"),
    [
        ("post", "", {"name": "add"}, 400, "loaded already"),
        ("post", "", {"name": "none", "path": "add"}, 400, "means no plan"),
        ("post", "", {"name": "x", "path": "../../etc"}, 403, "not inside"),
        ("post", "", {"name": "x", "path": "other"}, 400, "plan.json"),
        ("post", "", {"name": "x", "path": "missing"}, 400, "no folder"),
        ("post", "", {"name": "x", "path": "narrow"}, 400, "width 8"),
        ("post", "", {"name": "x", "path": "ablate", "scale": 1e9}, 400, "scale must be between"),
        ("post", "", {"name": "x", "path": "ablate", "strength": 1}, 422, "strength"),
        ("post", "", {"name": 5}, 422, "name"),
        ("post", "", {}, 422, "name"),
        ("patch", "/x", {"scale": 1}, 404, "no plan 'x'"),
        ("patch", "/add", {"scale": "high"}, 422, "scale"),
        ("patch", "/add", {}, 422, "scale"),
        ("delete", "/x", None, 404, "no plan 'x'"),
    ],
)
def test_bad_calls_name_what_is_wrong_and_change_nothing(
    client: TestClient, engine: Engine, method: str, path: str, body: Any, status: int, sentence: str
) -> None:
    before = [dict(worker.plans) for worker in engine.workers]
    given = {} if body is None else {"json": body}
    answer = getattr(client, method)(f"/v1/steerkern/plans{path}", **given)
    assert answer.status_code == status
    assert sentence in answer.text
    assert [dict(worker.plans) for worker in engine.workers] == before
    assert names(client) == ["add"]


def test_a_worker_that_refuses_leaves_the_plan_on_none(client: TestClient, engine: Engine) -> None:
    engine.workers[1].sites = ()
    answer = client.post("/v1/steerkern/plans", json={"name": "ablate"})
    assert answer.status_code == 400
    assert "not installed there" in answer.json()["detail"]
    assert all(len(worker.plans) == 1 for worker in engine.workers)
    assert names(client) == ["add"]


def test_a_plan_that_runs_is_unloaded_when_its_last_request_ends(client: TestClient, engine: Engine) -> None:
    admission: Admission = engine.input_processor.__dict__[hooks.HELD]
    digest = client.get("/v1/steerkern/plans").json()["plans"][0]["digest"]
    admission.running["r"] = (digest,)
    assert client.delete("/v1/steerkern/plans/add").status_code == 200
    assert names(client) == []
    assert all(digest in worker.plans for worker in engine.workers)
    del admission.running["r"]
    client.get("/metrics/")
    assert all(digest not in worker.plans for worker in engine.workers)


def test_one_plan_under_two_names_stays_until_both_are_gone(client: TestClient, engine: Engine) -> None:
    client.post("/v1/steerkern/plans", json={"name": "again", "path": "add"})
    client.delete("/v1/steerkern/plans/again")
    assert all(len(worker.plans) == 1 for worker in engine.workers)
    client.delete("/v1/steerkern/plans/add")
    assert all(not worker.plans for worker in engine.workers)


def test_a_server_without_a_folder_loads_nothing(client: TestClient, engine: Engine) -> None:
    admission: Admission = engine.input_processor.__dict__[hooks.HELD]
    assert admission.library is not None
    admission.library.settings = Settings()
    assert client.post("/v1/steerkern/plans", json={"name": "ablate"}).status_code == 403


def test_several_api_processes_are_refused(client: TestClient, engine: Engine) -> None:
    engine.vllm_config.parallel_config._api_process_count = 2
    assert "several API processes" in client.delete("/v1/steerkern/plans/add").text


def test_metrics_count_what_the_workers_did(client: TestClient, engine: Engine) -> None:
    admission: Admission = engine.input_processor.__dict__[hooks.HELD]
    assert admission.library is not None
    from steerkern.integrations.vllm.asked import Wish

    ticket = admission.library.ticket([Wish("add")], 5)
    assert ticket is not None
    for worker in engine.workers:
        worker.arrive("r", ticket)
        worker.forward(["r"], [0], [5])
    for _ in range(2):  # a scrape adds what is new only
        text = client.get("/metrics/").text
    assert "steerkern:plans_loaded 1.0" in text
    assert "steerkern:steered_rows_total 5.0" in text
    assert "steerkern:steered_requests_total 1.0" in text


def test_receipts_stand_in_the_response_and_at_the_end_of_a_stream(client: TestClient, engine: Engine) -> None:
    admission: Admission = engine.input_processor.__dict__[hooks.HELD]
    assert admission.library is not None
    library = admission.library

    async def answer(serving: Any, request: Any) -> Any:
        wishes, receipt = [server_wish], request.vllm_xargs["steerkern_receipt"]
        ticket = library.ticket(wishes, 5, receipt)
        assert ticket is not None
        for worker in engine.workers:
            worker.arrive("r", ticket)
            worker.forward(["r"], [0], [5])
            worker.leave(["r"])
        return stream() if request.stream else SimpleNamespace(choices=[])

    async def stream() -> AsyncIterator[str]:
        yield 'data: {"id": "x", "object": "chunk", "model": "m", "choices": [{"text": "a"}]}\n\n'
        yield "data: [DONE]\n\n"

    from steerkern.integrations.vllm.asked import Wish

    server_wish = Wish("add")
    serving = SimpleNamespace(engine_client=engine)
    written = {"plans": {"add": {"scale": 1.0, "tokens": 5, "sites": ["resid_pre[1]"]}}}

    async def whole() -> None:
        request = SimpleNamespace(vllm_xargs={"steerkern": "add", "steerkern_receipt": 1}, stream=False)
        response = await server._with_receipt(answer, serving, request)
        assert response.steerkern == written
        request = SimpleNamespace(vllm_xargs={"steerkern": "add", "steerkern_receipt": 1}, stream=True)
        chunks = [chunk async for chunk in await server._with_receipt(answer, serving, request)]
        assert chunks[-1] == "data: [DONE]\n\n"
        last = json.loads(chunks[-2].removeprefix("data: "))
        assert last == {"id": "x", "object": "chunk", "model": "m", "choices": [], "steerkern": written}

    asyncio.run(whole())
