"""Plans of a running server: loaded, unloaded and exchanged under load; receipts and metrics that say what was done."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest

import steerkern as sk
from tests.serving.asked import Ask, expected, vector
from tests.serving.models import LAYERS
from tests.serving.server import SECONDS, Server, chatty, serving

VERSIONS = {f"v{i}": sk.Plan(sk.add(vector(10 + i), 6.0), layers=1 + i % 2, name="swap") for i in range(3)}
STEADY = sk.Plan(sk.ablate(vector(20)), name="steady")
NEW = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("plans")
    for name, plan in {**VERSIONS, "steady": STEADY}.items():
        plan.save_pretrained(root / name)
    sk.Plan(sk.add(vector(1)[:16]), layers=1, name="narrow").save_pretrained(root / "narrow")
    sk.Plan(sk.add(vector(1)), layers=LAYERS, name="deep").save_pretrained(root / "deep")
    with serving(chatty(), {"plans": {"steady": str(root / "steady")}, "folder": str(root)}) as running:
        yield running


@functools.cache
def reply(prompt: tuple[int, ...], version: str | None) -> list[int]:
    """Of the session, alone."""
    plans = {**VERSIONS, "steady": STEADY}
    return expected(chatty(), plans, [Ask(prompt, version, NEW)])[0]


def call(server: Server, method: str, path: str = "", body: Any = None) -> Any:
    import httpx

    return httpx.request(method, f"{server.url}/v1/steerkern/plans{path}", json=body, timeout=SECONDS)


def names(server: Server) -> list[str]:
    return [plan["name"] for plan in call(server, "GET").json()["plans"]]


def test_a_plan_is_loaded_rescaled_used_and_unloaded(server: Server) -> None:
    prompt = (5, 6, 7, 8)
    asked = {"steerkern": "swap"}
    assert server.post("completions", server.body(Ask(prompt, asked))).status_code == 400
    assert call(server, "POST", "", {"name": "swap", "path": "v0"}).status_code == 201
    made = server.post("completions", server.body(Ask(prompt, asked, NEW))).json()
    assert made["choices"][0]["token_ids"] == reply(prompt, "v0")
    assert call(server, "PATCH", "/swap", {"scale": 0}).status_code == 200
    made = server.post("completions", server.body(Ask(prompt, asked, NEW))).json()
    assert made["choices"][0]["token_ids"] == reply(prompt, None)
    assert call(server, "DELETE", "/swap").status_code == 200
    assert names(server) == ["steady"]
    assert server.post("completions", server.body(Ask(prompt, asked))).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"name": "narrow"}, 400, "width 16"),
        ({"name": "deep"}, 400, f"layer {LAYERS}"),
        ({"name": "x", "path": "missing"}, 400, "no folder"),
        ({"name": "x", "path": "../.."}, 403, "not inside"),
        ({"name": "steady"}, 400, "loaded already"),
        ({"name": "x", "path": "v0", "scale": 1e9}, 400, "scale must be between"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_at_load(server: Server, body: Any, status: int, sentence: str) -> None:
    answer = call(server, "POST", "", body)
    assert (answer.status_code, sentence in answer.text) == (status, True), answer.text
    assert names(server) == ["steady"]


def test_a_receipt_and_the_metrics_say_what_was_written(server: Server) -> None:
    import httpx

    def rows() -> float:
        text = httpx.get(f"{server.url}/metrics", timeout=SECONDS).text
        return float(next(x for x in text.splitlines() if x.startswith("steerkern:steered_rows_total")).split()[1])

    before = rows()
    asked = {"steerkern": "steady", "steerkern_scope": "decode", "steerkern_receipt": 1}
    made = server.post("completions", server.body(Ask((5, 6, 7), asked, 10))).json()
    written = made["steerkern"]["plans"]["steady"]
    assert written["sites"] == [f"resid_pre[{i}]" for i in range(LAYERS)]
    assert written["tokens"] == 9  # the last token is not fed back
    assert rows() - before == 9


def test_plans_exchanged_under_load_never_mix(server: Server) -> None:
    """200 requests, 16 at once, some hung up on, while the plan of one name becomes another again and again.

    A reply is by one version from its first token to its last, and by one that had the name while it was asked for.
    """
    import httpx

    dice = random.Random(1)
    prompts = [tuple(dice.choices(range(9, 900), k=k)) for k in (1, 4, 20, 40)]
    assert len({tuple(reply(prompts[0], one)) for one in (*VERSIONS, None)}) == len(VERSIONS) + 1
    history: list[str | None] = [None]  # which version has the name, as it changes
    url = f"{server.url}/v1/steerkern/plans"

    async def run() -> list[tuple[tuple[int, ...], set[str | None], list[int] | None, int | None]]:
        several, done = asyncio.Semaphore(16), asyncio.Event()
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=SECONDS) as client:

            async def exchange() -> None:
                while not done.is_set():
                    version = dice.choice([one for one in VERSIONS if one != history[-1]])
                    history.append(version)
                    loaded = await client.post(url, json={"name": "swap", "path": version})
                    assert loaded.status_code == 201, loaded.text
                    await asyncio.sleep(0.2)
                    gone = await client.delete(f"{url}/swap")
                    assert gone.status_code == 200, gone.text
                    history.append(None)

            async def one(number: int) -> tuple[tuple[int, ...], set[str | None], list[int] | None, int | None]:
                async with several:
                    prompt, stop = prompts[number % len(prompts)], dice.choice([None, None, None, 5])
                    if number % 3 == 0:
                        steady = await server.tokens(client, Ask(prompt, {"steerkern": "steady"}, NEW), stop)
                        return prompt, {"steady"}, steady, stop
                    begun = max(0, len(history) - 1)
                    try:
                        tokens = await server.tokens(client, Ask(prompt, {"steerkern": "swap"}, NEW), stop)
                    except AssertionError as refused:
                        if "is loaded; known are" not in str(refused):
                            raise
                        return prompt, set(), None, stop
                    return prompt, set(history[max(0, begun - 1) :]), tokens, stop

            changing = asyncio.create_task(exchange())
            found = await asyncio.gather(*(one(number) for number in range(200)))
            done.set()
            await changing
            return found

    found = asyncio.run(run())
    answered = 0
    for prompt, versions, tokens, stop in found:
        if tokens is None:
            continue
        wanted = [reply(prompt, version) for version in versions - {None}]
        assert tokens
        assert any(tokens == (one if stop is None else one[: len(tokens)]) for one in wanted), (
            prompt,
            versions,
            tokens,
        )
        answered += versions != {"steady"}
    assert answered >= 40
    assert len(history) >= 8
