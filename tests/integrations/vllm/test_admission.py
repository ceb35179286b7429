"""The API process: tickets, the names of blocks that follow from them, and which plans must be kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import steerkern as sk
from steerkern.decisions import Condition, Latch, Read, Term
from steerkern.errors import PlanError
from steerkern.integrations.vllm.admission import Admission
from steerkern.integrations.vllm.asked import Ticket, Wish, ticket_of
from steerkern.integrations.vllm.library import Library, UnknownPlan, inside
from steerkern.integrations.vllm.prefix_cache import extra_keys, keys_of
from steerkern.integrations.vllm.settings import Settings
from tests.integrations.vllm.conftest import vector
from tests.integrations.vllm.engine import LAYERS, WIDTH, config

NAMES = ("add", "ablate", "late")


def library(folder: Path, **settings: Any) -> Library:
    return Library(Settings(plans={name: str(folder / name) for name in NAMES}, **settings), WIDTH, LAYERS)


def admission(folder: Path, **changed: Any) -> Admission:
    settings = {"plans": {name: str(folder / name) for name in NAMES}, **changed.pop("settings", {})}
    return Admission.of(config(settings, **changed))


def request(extra_args: Any, tokens: int = 10, name: str = "r") -> Any:
    params = SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(request_id=name, sampling_params=params, prompt_token_ids=[1] * tokens, cache_salt=None)


def test_a_ticket_says_from_where_on_the_cache_shows_it(folder: Path) -> None:
    held = library(folder)
    first = {name: held.ticket([Wish(name)], 10) for name in NAMES}
    assert {name: ticket and ticket.first for name, ticket in first.items()} == {"add": 0, "ablate": 10, "late": 9}
    together = held.ticket([Wish("ablate"), Wish("late")], 10)
    assert together is not None
    assert (together.first, together.by_length) == (9, 9)
    everywhere = held.ticket([Wish("add")], 10)
    assert everywhere is not None
    assert everywhere.by_length > 10**9  # the same in a longer prompt that begins alike


def test_who_asks_for_nothing_gets_the_default_and_none_means_none(folder: Path) -> None:
    held = library(folder, default="add")
    own, none = held.ticket(None, 10), held.ticket([], 10)
    assert own is not None
    assert none is None
    assert library(folder).ticket(None, 10) is None


def test_scales_multiply_and_zero_is_plain(folder: Path) -> None:
    held = library(folder)
    held.rescale("add", 0.5)
    ticket = held.ticket([Wish("add", 3.0)], 10)
    assert ticket is not None
    assert ticket.plans[0].scale == 1.5
    held.rescale("add", 0)
    assert held.ticket([Wish("add", 3.0)], 10) is None


def test_blocks_are_named_by_the_steering_that_touched_them(folder: Path) -> None:
    held = library(folder)
    decode, add = held.ticket([Wish("ablate")], 40), held.ticket([Wish("add")], 40)
    assert extra_keys(None, 16) == extra_keys(decode, 16) == extra_keys(decode, 32) == []
    assert extra_keys(decode, 48)
    assert extra_keys(add, 16) != extra_keys(decode, 48)
    longer = held.ticket([Wish("ablate")], 44)
    assert extra_keys(decode, 48) != extra_keys(longer, 48)  # what was reply to one is prompt to the other
    assert extra_keys(add, 48) == extra_keys(held.ticket([Wish("add")], 44), 48)


def test_the_scheduler_reads_a_ticket_once(folder: Path) -> None:
    asked = request({"steerkern": "add"})
    admission(folder).admit(asked)
    queued = SimpleNamespace(sampling_params=asked.sampling_params)
    keys = keys_of(queued, 16)
    queued.sampling_params = None
    assert keys_of(queued, 16) == keys != []


def test_what_was_asked_becomes_a_ticket(folder: Path) -> None:
    asked = request({"steerkern": "add", "steerkern_scale": 2.0, "other": 5})
    admission(folder).admit(asked)
    extra = asked.sampling_params.extra_args
    assert set(extra) == {"other", "steerkern_ticket"}
    ticket = ticket_of(asked.sampling_params)
    assert isinstance(ticket, Ticket)
    assert ticket.plans[0].scale == 2.0
    plain = request({"steerkern": "none"})
    admission(folder).admit(plain)
    assert plain.sampling_params.extra_args is None


def test_a_cache_outside_the_engine_gets_a_salt(folder: Path) -> None:
    salted, plain, inner = request({"steerkern": "add"}), request(None), request({"steerkern": "add"})
    outside = admission(folder, kv_transfer_config=object())
    outside.admit(salted)
    outside.admit(plain)
    admission(folder).admit(inner)
    assert salted.cache_salt
    assert plain.cache_salt is inner.cache_salt is None


def test_an_unsteered_engine_refuses_who_asks() -> None:
    bare = Admission.of(config())
    bare.admit(request(None))
    bare.admit(request({"steerkern": "none"}))
    with pytest.raises(Exception, match="without additional_config") as refusal:
        bare.admit(request({"steerkern": "add"}))
    assert refusal.value.parameter == "steerkern"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"steerkern": "open"}, "no plan 'open'"),
        ({"steerkern": ["ablate", "add"], "steerkern_receipt": 1}, "must be the name of a receipt"),
        ({"steerkern": "add", "steerkern_scale": -1e5}, "steerkern_scale"),
    ],
)
def test_refusals_are_vllms_own_errors(folder: Path, asked: Any, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence) as refusal:
        admission(folder).admit(request(asked))
    assert type(refusal.value).__name__ == "VLLMValidationError"


def test_beam_search_is_refused_where_it_would_run_plain(folder: Path) -> None:
    admission(folder).refuse_beams(None)
    admission(folder).refuse_beams({"steerkern": "none"})
    with pytest.raises(Exception, match="beam search"):
        admission(folder).refuse_beams({"steerkern": "add"})
    with pytest.raises(Exception, match="beam search"):
        admission(folder, settings={"default": "add"}).refuse_beams(None)


def test_a_receipt_over_http_needs_the_routes(folder: Path) -> None:
    served = admission(folder)
    with pytest.raises(Exception, match="VLLM_PLUGINS=steerkern"):
        served.check({"steerkern": "add", "steerkern_receipt": 1})
    served.receipts = True
    served.check({"steerkern": "add", "steerkern_receipt": "r"})


def test_a_plan_is_in_use_until_the_last_request_that_has_it_ends(folder: Path) -> None:
    served = admission(folder)
    assert served.library is not None
    digest = served.library.get("add").plan.digest
    served.check(None)  # a server, not an offline engine
    served.admit(request({"steerkern": "add"}, name="r"))
    served.library.take("add")
    assert served.in_use(digest)

    async def outputs() -> AsyncIterator[int]:
        yield 1
        assert served.in_use(digest)
        raise asyncio.CancelledError

    async def run() -> None:
        async for _ in served.tracked("r", outputs()):
            pass

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert not served.in_use(digest)


def test_an_offline_engine_keeps_no_list_of_requests(folder: Path) -> None:
    offline = admission(folder)
    offline.admit(request({"steerkern": "add"}))
    assert offline.running == {}


def latched(token: int | str, scope: str) -> sk.Plan:
    condition = Condition((Term(Read(1, "resid_pre", token), vector(0), measure="coordinate"),), lo=0.0)  # type: ignore[arg-type]
    return sk.Plan(sk.add(vector(1)), layers=1, scope=scope, name="cast", latch=Latch((condition,)))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (sk.Plan(sk.add(vector(1)[:16]), layers=1, name="p"), "width 16"),
        (sk.Plan(sk.add(vector(1)), layers=LAYERS, name="p"), "layer 3"),
        (sk.Plan(sk.probe(vector(1)), layers=1, name="p"), "has a probe"),
        (sk.Plan(sk.add(vector(1)), layers=1, scope=sk.Tokens(after=(5,)), name="p"), "waits for token sequences"),
        (latched(-1, "all"), "scope 'decode' works"),
        (latched("mean", "decode"), "last prompt token"),
    ],
)
def test_plans_that_no_server_can_run(folder: Path, plan: sk.Plan, sentence: str) -> None:
    held = library(folder)
    with pytest.raises(PlanError, match=sentence):
        held.shelf("p", plan, "somewhere")
    assert set(held.shelves) == set(NAMES)


def test_a_plan_that_decides_at_the_end_of_the_prompt_is_servable(folder: Path) -> None:
    held = library(folder)
    held.put(held.shelf("cast", latched(-1, "decode"), "somewhere"))
    ticket = held.ticket([Wish("cast")], 10)
    assert ticket is not None
    assert ticket.first == 10


def test_names_are_taken_once_and_the_library_has_an_end(folder: Path, plans: dict[str, sk.Plan]) -> None:
    held = library(folder, max_plans=4, default="add")
    with pytest.raises(PlanError, match="loaded already"):
        held.shelf("add", plans["add"], "somewhere")
    held.put(held.shelf("more", plans["add"], "somewhere"))
    with pytest.raises(PlanError, match="max_plans"):
        held.shelf("evenmore", plans["add"], "somewhere")
    with pytest.raises(PlanError, match="default"):
        held.take("add")
    held.take("more")
    with pytest.raises(UnknownPlan):
        held.take("more")


def test_positions_that_may_be_taken_back_are_refused(folder: Path) -> None:
    guessing = Library(Settings(), WIDTH, LAYERS, speculative=True)
    guessing.shelf("steady", sk.Plan(sk.add(vector(1)), layers=1), "somewhere")
    with pytest.raises(PlanError, match="speculative"):
        guessing.shelf("p", sk.Plan(sk.add(vector(1)), layers=1, scope=sk.Tokens(first=3)), "somewhere")


def test_a_request_has_an_entry_budget(folder: Path) -> None:
    held = library(folder, max_entries=4)
    assert held.ticket([Wish("ablate")], 10) is not None  # 3 layers
    with pytest.raises(PlanError, match="max_entries is 4"):
        held.ticket([Wish("ablate"), Wish("add")], 10)


def test_paths_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "plans" / "a").mkdir(parents=True)
    (tmp_path / "plans" / "link").symlink_to(tmp_path)
    assert inside(str(tmp_path / "plans"), "a") == (tmp_path / "plans" / "a").resolve()
    for path in ("..", "../x", "/etc", "link", "a/../../x"):
        with pytest.raises(PermissionError, match="not inside"):
            inside(str(tmp_path / "plans"), path)
