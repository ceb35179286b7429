"""A worker: sites found in a model of vLLM's shape, steered rows of mixed batches, requests that come and go."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkern as sk
from steerkern.decisions import Condition, Latch, Read, Term
from steerkern.errors import PlanError
from steerkern.integrations.vllm.anatomy import Anatomy
from steerkern.integrations.vllm.asked import Ticket, Wish
from steerkern.integrations.vllm.library import Library
from steerkern.integrations.vllm.remote import VERBS
from steerkern.integrations.vllm.settings import Settings
from steerkern.integrations.vllm.worker import Steering
from tests.integrations.vllm.conftest import vector
from tests.integrations.vllm.engine import LAYERS, WIDTH, Block, Model, RMSNorm

Examine = Callable[[nn.Module], Anatomy]
TOKENS, REQUESTS = 64, 8


class Engine:
    """A worker and the library of its server, driven as a scheduler would."""

    def __init__(self, model: Model, anatomy: Anatomy, plans: Sequence[sk.Plan], **settings: Any) -> None:
        self.model = model
        own = Settings(**{"sites": "all", **settings})
        self.library = Library(own, WIDTH, LAYERS)
        for plan in plans:
            self.library.put(self.library.shelf(plan.name, plan, "memory"))
        self.steering = Steering(
            own, anatomy, plans, tokens=TOKENS, requests=REQUESTS, device=torch.device("cpu"), dtype=torch.float32
        )
        self.steering.install()

    def add(self, name: str, prompt: int, *asked: str | Wish, receipt: str = "") -> Ticket | None:
        wishes = [one if isinstance(one, Wish) else Wish(one) for one in asked]
        ticket = self.library.ticket(wishes, prompt, receipt)
        if ticket is not None:
            self.steering.arrive(name, ticket)
        return ticket

    def run(self, rows: Sequence[tuple[str, int, int]], ids: Tensor, padding: int = 0) -> list[Tensor]:
        """One forward of ``(request, past, tokens)``, with rows after the batch as a captured graph has them."""
        names, past, tokens = zip(*rows, strict=True)
        self.steering.forward(names, past, tokens)
        with torch.no_grad():
            out = self.model(torch.cat([ids, torch.zeros(padding, dtype=torch.long)]))
        assert len(out) == sum(tokens) + padding
        return list(out[: sum(tokens)].split(tokens))


def expected(model: Model, ids: Tensor, edits: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """What the model gives when the residual stream that enters a block (``LAYERS``: the final norm) is edited."""
    with torch.no_grad():
        h = model.embed(ids)
        for i, block in enumerate(model.layers):
            h = edits.get(i, lambda h: h)(h)
            assert isinstance(block, Block)
            mid = h + block.attention(block.input_layernorm.forward_native(h))
            h = mid + block.mlp(block.post_attention_layernorm.forward_native(mid))
        return model.norm.forward_native(edits.get(LAYERS, lambda h: h)(h))  # type: ignore[no-any-return]


def adding(seed: int, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda h: h + scale * vector(seed)


def test_every_site_of_an_ordinary_model(model: Model, examined: Examine) -> None:
    anatomy = examined(model)
    names = [f"{name}[{i}]" for i in range(LAYERS) for name in ("resid_pre", "resid_mid")] + ["resid_post[2]"]
    assert [str(site) for site in anatomy.sites] == names
    assert not anatomy.refused
    blocks = [block for block in model.layers if isinstance(block, Block)]
    inner = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    assert [spec.module for spec in anatomy.sites.values()] == [*inner, model.norm]


class PostNorm(Block):
    """Its norms read what attention and mlp give, never the stream."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x if residual is None else x + residual
        h = h + self.input_layernorm(self.attention(h))
        return self.post_attention_layernorm(self.mlp(h)), h


class Scaled(Block):
    """A norm that is fed another tensor than the stream, under the usual name."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().forward(x * 1.0, residual)


@pytest.mark.parametrize("block", [PostNorm, Scaled])
def test_blocks_without_a_site_are_refused_with_the_reason(block: type[Block], examined: Examine) -> None:
    torch.manual_seed(0)
    anatomy = examined(Model(block=block))
    pre = [site for site in anatomy.refused if site.name == "resid_pre"]
    assert len(pre) == LAYERS
    plan = sk.Plan(sk.add(vector(1)), layers=1, name="p")
    with pytest.raises(PlanError, match=r"resid_pre\[1\]: no norm reads what the block is given"):
        Steering(
            Settings(sites="all"), anatomy, [plan], tokens=8, requests=2, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip


def test_a_norm_of_another_arithmetic_is_refused(examined: Examine) -> None:
    class Odd(RMSNorm):
        def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
            out = super().forward_native(x, residual)
            return out.tanh() if residual is None else (out[0].tanh(), out[1])

    model = Model()
    model.norm = Odd(WIDTH)
    anatomy = examined(model)
    assert {str(site): reason for site, reason in anatomy.refused.items()} == {
        "resid_post[2]": "Odd is none of the known norms"
    }


def test_a_mixed_batch(model: Model, examined: Examine, plans: dict[str, sk.Plan]) -> None:
    engine = Engine(model, examined(model), list(plans.values()))
    engine.add("a", 4, Wish("add", 2.0))
    engine.add("b", 3, "late")
    ids = torch.arange(12) + 1
    a, plain, b = engine.run([("a", 0, 4), ("x", 0, 5), ("b", 0, 3)], ids, padding=4)
    assert torch.allclose(a, expected(model, ids[:4], {1: adding(1, 6.0)}), atol=1e-5)
    assert torch.allclose(plain, expected(model, ids[4:9], {}), atol=1e-5)
    late = expected(model, ids[9:], {})
    late[-1] = expected(model, ids[-1:], {LAYERS: adding(3, 5.0)})[0]
    assert torch.allclose(b, late, atol=1e-5)
    b, a = engine.run([("b", 3, 1), ("a", 4, 1)], ids[:2])
    assert torch.allclose(b, expected(model, ids[:1], {LAYERS: adding(3, 5.0)}), atol=1e-5)
    assert torch.allclose(a, expected(model, ids[1:2], {1: adding(1, 6.0)}), atol=1e-5)


def test_rows_after_the_batch_are_never_steered(model: Model, examined: Examine, plans: dict[str, sk.Plan]) -> None:
    """A captured graph runs its padding too, after batches that were longer."""
    engine = Engine(model, examined(model), [plans["add"]])
    engine.add("a", 16, "add")
    engine.run([("a", 0, 16)], torch.arange(16))
    engine.run([("a", 16, 1)], torch.arange(1), padding=15)
    assert (engine.steering.rows.slot[1:] == -1).all()
    assert (engine.steering.rows.slot[:1] >= 0).all()
    engine.steering.leave(["a"])
    engine.run([("x", 0, 1)], torch.arange(1), padding=15)
    assert (engine.steering.rows.slot == -1).all()


def test_chunks_of_a_prompt(model: Model, examined: Examine, plans: dict[str, sk.Plan]) -> None:
    engine = Engine(model, examined(model), list(plans.values()))
    engine.add("a", 10, Wish("add", 1.0, "prompt"), "ablate")
    ids = torch.arange(12) + 1
    whole = torch.cat([engine.run([("a", at, n)], ids[at : at + n])[0] for at, n in ((0, 4), (4, 4), (8, 4))])
    unit = vector(2) / vector(2).norm()
    ablated = expected(model, ids[10:], dict.fromkeys(range(LAYERS), lambda h: h - (h @ unit)[:, None] * unit))
    assert torch.allclose(whole[:10], expected(model, ids[:10], {1: adding(1, 3.0)}), atol=1e-5)
    assert torch.allclose(whole[10:], ablated, atol=1e-5)


def latched(threshold: float) -> sk.Plan:
    term = Term(Read(2, "resid_pre", -1), vector(4), measure="coordinate")
    latch = Latch((Condition((term,), lo=threshold),))
    return sk.Plan(sk.add(vector(1), 3.0), layers=1, scope="decode", name="cast", latch=latch)


def test_decisions_are_made_by_the_last_prompt_token(model: Model, examined: Examine) -> None:
    """Though other requests end their prompts in the same forward, and one is gone before it was decided."""
    states: list[Tensor] = []
    handle = model.layers[2].register_forward_pre_hook(lambda _, args: states.append(args[0] + args[1]))
    ids = torch.arange(12) + 1
    with torch.no_grad():
        model(ids)
    handle.remove()
    coordinates = states[0] @ (vector(4) / vector(4).norm())
    lasts = coordinates[[3, 6, 11]]
    engine = Engine(model, examined(model), [latched(float(lasts.sort().values[1:].mean()))])
    for name, prompt in (("a", 4), ("gone", 3), ("b", 5)):
        engine.add(name, prompt, "cast")
    engine.run([("a", 0, 4), ("gone", 0, 3), ("b", 0, 5)], ids)
    engine.steering.leave(["gone"])
    out = engine.run([("b", 5, 1), ("a", 4, 1)], ids[:2])
    opened = [not torch.allclose(one, expected(model, ids[i : i + 1], {}), atol=1e-5) for i, one in enumerate(out)]
    threshold = lasts.sort().values[1:].mean()
    assert opened == [bool(lasts[2] > threshold), bool(lasts[0] > threshold)]
    assert any(opened) or bool(lasts[1] > threshold)


def test_a_plan_that_decides_must_be_there_from_the_start(model: Model, examined: Examine) -> None:
    engine = Engine(model, examined(model), [])
    with pytest.raises(PlanError, match="when the server starts"):
        engine.steering.load(latched(0.0))


def test_sites_of_the_plans_only(model: Model, examined: Examine, plans: dict[str, sk.Plan]) -> None:
    engine = Engine(model, examined(model), [plans["add"]], sites="plans")
    assert [str(site) for site in engine.steering.sites] == ["resid_pre[1]"]
    with pytest.raises(PlanError, match="start the server with sites 'all'"):
        engine.steering.load(plans["ablate"])


def test_receipts_and_counts(model: Model, examined: Examine, plans: dict[str, sk.Plan]) -> None:
    engine = Engine(model, examined(model), list(plans.values()))
    engine.add("a", 4, "add", receipt="r")
    engine.add("b", 4, "ablate", receipt="r")
    engine.run([("a", 0, 4), ("b", 0, 4)], torch.arange(8))
    for step in range(5):
        engine.run([("a", 4 + step, 1), ("b", 4 + step, 1)], torch.arange(2))
    running = engine.steering.receipt("r")
    engine.steering.leave(["a", "b"])
    ended = VERBS["receipt"](engine.steering, "r")
    assert running == ended
    assert {name: own["tokens"] for name, own in ended["plans"].items()} == {"add": 9, "ablate": 5}
    assert ended["plans"]["ablate"]["sites"] == ["resid_pre[0]", "resid_pre[1]", "resid_pre[2]"]
    assert VERBS["summary"](engine.steering) == {"rows": 14, "requests": 2, "plans": 3}
    assert engine.steering.receipt("unknown") is None


def test_loading_over_rpc_gives_sentences(model: Model, examined: Examine, folder: Path) -> None:
    engine = Engine(model, examined(model), [])
    digest = sk.Plan.from_pretrained(folder / "add").digest
    assert (
        VERBS["load"](engine.steering, "add", str(folder / "add"), "other") == "plan 'add' changed while it was loaded"
    )
    assert "no folder" in VERBS["load"](engine.steering, "x", str(folder / "x"), digest)
    assert VERBS["load"](engine.steering, "add", str(folder / "add"), digest) == ""
    assert list(engine.steering.plans) == [digest]
    VERBS["forget"](engine.steering, digest)
    assert not engine.steering.plans
    assert len(VERBS["sites"](engine.steering)["sites"]) == LAYERS + 1


def test_a_bank_that_is_full_refuses_the_plan(model: Model, examined: Examine) -> None:
    engine = Engine(model, examined(model), [], max_plans=1)
    for seed in range(LAYERS + 1):
        engine.steering.load(sk.Plan(sk.add(vector(seed)), layers=1, name=f"p{seed}"))
    with pytest.raises(PlanError, match="bank rows"):
        engine.steering.load(sk.Plan(sk.add(vector(9)), layers=1, name="p9"))


def test_load_with_swaps_and_cancels_shows_nobody_another_plan(model: Model, examined: Examine) -> None:
    """Hundreds of requests over few slots: each row equals what it is alone, whatever came and went around it."""
    engine = Engine(model, examined(model), [sk.Plan(sk.add(vector(0)), layers=0, name="p0")])
    dice, running, made = random.Random(0), {}, 1
    for step in range(300):
        if len(engine.library.shelves) < 6:
            plan = sk.Plan(sk.add(vector(made), 1.0), layers=made % LAYERS, name=f"p{made}")
            engine.steering.load(plan)
            engine.library.put(engine.library.shelf(plan.name, plan, "memory"))
            made += 1
        elif dice.random() < 0.3:
            name = dice.choice(sorted(engine.library.shelves))
            digest = engine.library.take(name).plan.digest
            if not any(digest in {one.digest for one in ticket.plans} for ticket, _, _ in running.values() if ticket):
                engine.steering.forget(digest)
        while len(running) < REQUESTS and dice.random() < 0.7:
            name, prompt = f"r{step}.{len(running)}", dice.randint(1, 5)
            wishes = [
                Wish(one, dice.choice([1.0, -2.0, 3.5])) for one in dice.sample(sorted(engine.library.shelves), 1)
            ]
            seed = int(wishes[0].name[1:])
            running[name] = (engine.add(name, prompt, *wishes), [0, prompt], (seed, wishes[0].scale))
        rows = [(name, state[0], state[1]) for name, (_, state, _) in running.items()]
        dice.shuffle(rows)
        if not rows:
            continue
        ids = torch.randint(50, (sum(count for _, _, count in rows),), generator=torch.Generator().manual_seed(step))
        outs, at = engine.run(rows, ids), 0
        for (name, past, count), out in zip(rows, outs, strict=True):
            seed, scale = running[name][2]
            alone = expected(model, ids[at : at + count], {seed % LAYERS: adding(seed, scale)})
            assert torch.allclose(out, alone, atol=1e-4), (step, name)
            at += count
            running[name][1][:] = [past + count, 1]
        for name in [one for one in running if dice.random() < 0.25]:
            engine.steering.leave([name])
            del running[name]
    assert made > 20
