"""The OpenAI-compatible server: each request steered as its ``vllm_xargs`` say, bad ones refused by name."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.serving.asked import Ask, expected, folders, mixed_plans
from tests.serving.server import SECONDS, Server, chatty, serving

PLANS = mixed_plans()
WAYS: list[tuple[dict[str, Any] | None, Any]] = [  # over HTTP, and offline
    (None, "early"),  # the server's default
    ({"steerkern": "none"}, None),
    ({"steerkern": "everywhere"}, "everywhere"),
    ({"steerkern": "last", "steerkern_scale": 0.5}, {"plan": "last", "scale": 0.5}),
    ({"steerkern": "early", "steerkern_scope": "decode"}, {"plan": "early", "scope": "decode"}),
    ({"steerkern": ["prompted", "everywhere"]}, ["prompted", "everywhere"]),
    ({"steerkern": '[{"plan": "early", "scale": -1.5}, "last"]'}, [{"plan": "early", "scale": -1.5}, "last"]),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(chatty(), {"plans": folders(PLANS), "default": "early"}) as running:
        yield running


@functools.cache
def reply(prompt: tuple[int, ...], way: int, new: int) -> list[int]:
    """Of the session."""
    return expected(chatty(), PLANS, [Ask(prompt, WAYS[way][1], new)])[0]


def gather(server: Server, asks: list[tuple[Ask, int | None]], at_once: int) -> list[list[int]]:
    """Replies to many requests, some hung up on, ``at_once`` of them running."""
    import httpx

    async def run() -> list[list[int]]:
        several = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:

            async def one(ask: Ask, stop: int | None) -> list[int]:
                async with several:
                    return await server.tokens(client, ask, stop)

            return await asyncio.gather(*(one(ask, stop) for ask, stop in asks))

    return asyncio.run(run())


def test_streamed_completions_side_by_side(server: Server) -> None:
    prompts = [tuple(range(5, 5 + n)) for n in (3, 9, 40, 4, 70, 9, 5)]
    asks = [Ask(prompt, WAYS[i][0]) for i, prompt in enumerate(prompts)]
    wanted = [reply(prompt, i, asks[i].new) for i, prompt in enumerate(prompts)]
    plain = [reply(prompt, 1, 12) for prompt in prompts]
    assert sum(one != other for one, other in zip(wanted, plain, strict=True)) >= 5
    assert gather(server, [(ask, None) for ask in asks], 6) == wanted


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_chats(server: Server, way: int) -> None:
    messages = [{"role": "user", "content": "How are you?"}]
    tokenizer = AutoTokenizer.from_pretrained(chatty())
    prompt = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    body = server.body(Ask((), WAYS[way][0]), messages=messages)
    del body["prompt"]
    made = server.post("chat/completions", body)
    assert made.status_code == 200, made.text
    assert tuple(made.json()["prompt_token_ids"]) == prompt
    assert made.json()["choices"][0]["token_ids"] == reply(prompt, way, 12)


def test_several_prompts_and_several_replies(server: Server) -> None:
    prompts = [(5, 6, 7), (8, 9)]
    made = server.post("completions", server.body(Ask((), WAYS[3][0]), prompt=prompts)).json()
    assert [one["token_ids"] for one in made["choices"]] == [reply(prompt, 3, 12) for prompt in prompts]
    chosen = {"n": 2, "temperature": 0.01, "seed": 1}  # greedy, but vLLM allows only one greedy reply
    made = server.post("completions", server.body(Ask((5, 6, 7), WAYS[2][0]), **chosen)).json()
    assert [one["token_ids"] for one in made["choices"]] == [reply((5, 6, 7), 2, 12)] * 2


BAD: list[tuple[str, str]] = [
    ('{"steerkern": "nobody"}', "no plan 'nobody' is loaded"),
    ('{"steerkern": ["early", "nobody"]}', "no plan 'nobody' is loaded"),
    ('{"steerkern": 5}', "steerkern must be a plan's name"),
    ('{"steerkern": [1.5]}', "steerkern must be a plan's name"),
    ('{"steerkern": "{\\"plan\\": 3}"}', "steerkern must be a plan's name"),
    ('{"steerkern": "{\\"plan\\""}', "steerkern is no JSON"),
    ('{"steerkern": "{\\"plan\\": \\"early\\", \\"layers\\": [1]}"}', "steerkern.layers is no field"),
    ('{"steerkern": ["early", "early"]}', "steerkern names a plan twice"),
    ('{"steerkern": ["early", "a", "b", "c", "d", "e", "f", "g", "h"]}', "steerkern names 9 plans"),
    ('{"steerkern": "early", "steerkern_scale": 1e9}', "steerkern_scale must be between"),
    ('{"steerkern": "early", "steerkern_scale": -1e300}', "steerkern_scale must be finite"),
    ('{"steerkern": "early", "steerkern_scale": 1e999}', "steerkern_scale must be finite"),
    ('{"steerkern": "early", "steerkern_scale": NaN}', "steerkern_scale must be finite"),
    ('{"steerkern": "early", "steerkern_scale": "1e999"}', "steerkern_scale must be a number"),
    ('{"steerkern": "early", "steerkern_scale": "2"}', "steerkern_scale must be a number"),
    ('{"steerkern": "early", "steerkern_scale": [1, 2]}', "steerkern_scale must be a number"),
    ('{"steerkern": "[{\\"plan\\": \\"early\\", \\"scale\\": 1e999}]"}', "steerkern_scale must be finite"),
    ('{"steerkern": "early", "steerkern_scope": "sideways"}', "steerkern_scope must be one of"),
    ('{"steerkern": "early", "steerkern_scope": 3}', "steerkern_scope must be one of"),
    ('{"steerkern_scale": 2}', "steerkern_scale needs steerkern"),
    ('{"steerkern": "early", "steerkern_scal": 2}', "steerkern_scal is no field"),
    ('{"steerkern_ticket": "x"}', "steerkern_ticket is no field"),
    ('{"steerkern": {"plan": "early"}}', "vllm_xargs"),  # vLLM's own refusal of what HTTP cannot carry
    ('{"steerkern": null}', "vllm_xargs"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("xargs", "sentence"), BAD)
def test_a_bad_field_is_a_400_that_names_it(server: Server, xargs: str, sentence: str, stream: bool) -> None:
    ask = Ask((5, 6, 7), "XARGS")
    completion = json.dumps(server.body(ask, stream=stream)).replace('"XARGS"', xargs)
    chat = completion.replace('"prompt": [5, 6, 7]', '"messages": [{"role": "user", "content": "Hi"}]')
    for route, body in (("completions", completion), ("chat/completions", chat)):
        answer = server.post(route, body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert sentence in error["message"], error
        assert "steerkern" in error["param"] or sentence == "vllm_xargs", error


def test_beams_are_refused(server: Server) -> None:
    body = server.body(Ask((5, 6, 7), {"steerkern": "early"}), use_beam_search=True, n=2)
    answer = server.post("completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steerkern")
    body = server.body(Ask((5, 6, 7), {"steerkern": "none"}), use_beam_search=True, n=2)
    assert server.post("completions", body).status_code == 200


def test_bad_requests_leave_their_neighbours_alone(server: Server) -> None:
    import httpx

    good = [(Ask((30 + i, 31, 32), WAYS[i][0], 40), i) for i in range(len(WAYS))]

    async def run() -> tuple[list[list[int]], list[int]]:
        async with httpx.AsyncClient(timeout=SECONDS) as client:

            async def bad(xargs: str) -> int:
                content = json.dumps(server.body(Ask((30, 31, 32), "XARGS"))).replace('"XARGS"', xargs)
                headers = {"Content-Type": "application/json"}
                url = f"{server.url}/v1/completions"
                return (await client.post(url, content=content, headers=headers)).status_code

            made = asyncio.gather(*(server.tokens(client, ask) for ask, _ in good))
            codes = await asyncio.gather(*(bad(xargs) for xargs, _ in BAD))
            return await made, codes

    found, codes = asyncio.run(run())
    assert set(codes) == {400}
    assert found == [reply(ask.prompt, way, 40) for ask, way in good]


def test_mixed_load_with_cancels(server: Server) -> None:
    """200 requests, 16 at once, every fifth hung up on: each reply is that of the request alone."""
    numbers = random.Random(0)
    stems = [tuple(numbers.choices(range(9, 900), k=64)) for _ in range(2)]
    tails = [tuple(numbers.choices(range(9, 900), k=k)) for k in (1, 2, 20, 40)]
    prompts = [*(stem + tail for stem in stems for tail in tails), (9, 10, 11)]
    drawn = [(numbers.choice(prompts), numbers.randrange(len(WAYS)), numbers.random() < 0.2) for _ in range(200)]
    asks = [(Ask(prompt, WAYS[way][0], 24), numbers.randint(1, 20) if cut else None) for prompt, way, cut in drawn]
    found = gather(server, asks, 16)
    assert sum(stop is not None for _, stop in asks) >= 20
    for (ask, stop), (prompt, way, _), tokens in zip(asks, drawn, found, strict=True):
        wanted = reply(prompt, way, 24)
        assert tokens == wanted if stop is None else tokens and tokens == wanted[: len(tokens)], ask
