"""The SGLang plugin on a fake of SGLang's shape: equal to the session on transformers, row by row and key by key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern.integrations import sglang
from steerkern.integrations.sglang import norms
from steerkern.integrations.sglang.plans import Plans
from steerkern.integrations.sglang.steering import AT_ONCE, Request, Steering
from tests.integrations.fake_sglang import Engine, FakeSGLang, ForCausalLM, ForwardMode, ServerArgs
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama

NEW = 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.fixture(scope="module")
def plans() -> dict[str, sk.Plan]:
    a, b, c = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
    return {
        "push": sk.Plan(sk.add(3 * a), layers=[1, 2], name="push"),
        "erase": sk.Plan(sk.ablate(b), name="erase"),
        "last": sk.Plan(sk.add(2 * c), layers=LAYERS - 1, site="resid_post", name="last"),
        "reply": sk.Plan(sk.add(4 * a), layers=0, scope="reply", name="reply"),
        "first": sk.Plan(sk.add(4 * b), layers=2, scope=sk.Tokens("decode", first=2), name="first"),
        "point": sk.Plan(sk.add(9 * c), layers=1, scope=-2, name="point"),
        "both": sk.Plan(sk.add(3 * a), layers=1, scope="prompt") + sk.Plan(sk.cap(b, -0.1, 0.1), name="both"),
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plans: dict[str, sk.Plan]) -> FakeSGLang:
    """With the plugin registered and applied, as SGLang does in each process."""
    for name, plan in plans.items():
        plan.named(name).save_pretrained(tmp_path / name)
    monkeypatch.setenv(sglang.VARIABLE, os.pathsep.join(str(tmp_path / name) for name in plans))
    fake = FakeSGLang(monkeypatch)
    sglang.register()
    fake.registry.apply_hooks()
    return fake


@pytest.fixture
def engine(fake: FakeSGLang, model: LlamaForCausalLM) -> Engine:
    return Engine(fake, model)


def prompt(seed: int, length: int = 9) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


EXPECTED: dict[tuple[Any, ...], tuple[list[int], torch.Tensor]] = {}


def expected(model: LlamaForCausalLM, ids: list[int], plan: sk.Plan | None) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers under a session, and the logits they were taken from."""
    key = (*ids, plan and plan.digest)
    if key not in EXPECTED:
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        with sk.steer(model, plan if plan is not None else []):
            out = model.generate(torch.tensor([ids]), **options)
        EXPECTED[key] = out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)
    return EXPECTED[key]


def check(req: Any, model: LlamaForCausalLM, plan: sk.Plan | None) -> None:
    tokens, logits = expected(model, req.origin_input_ids, plan)
    assert req.output_ids == tokens
    torch.testing.assert_close(torch.stack(req.logits), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1 << 30, 4])
def test_requests_of_one_batch_get_each_its_own_plan(
    engine: Engine, model: LlamaForCausalLM, plans: dict[str, sk.Plan], chunk: int
) -> None:
    names = [None, "push", "erase", "last", "reply", "first", "point", "both", "push"]
    reqs = [engine.request(prompt(i, 7 + i), n and {"plan": n, "scale": 1 + i / 8}) for i, n in enumerate(names)]
    engine.generate(reqs, NEW, chunk)
    for i, (req, name) in enumerate(zip(reqs, names, strict=True)):
        check(req, model, name and plans[name].scaled(1 + i / 8))
        with torch.no_grad():
            plain = model(torch.tensor([[*req.origin_input_ids, *req.output_ids[:-1]]])).logits[0, -NEW:]
        assert ((torch.stack(req.logits) - plain).abs().max() > 0.05) == (name is not None)


def test_extends_and_decodes_share_a_forward(
    engine: Engine, model: LlamaForCausalLM, plans: dict[str, sk.Plan]
) -> None:
    early = [engine.request(prompt(1), {"plan": "push"}), engine.request(prompt(2))]
    late = [
        engine.request(prompt(3), {"plan": "point"}),
        engine.request(prompt(4), {"plan": "erase", "scope": "reply"}),
    ]
    engine.extend(early, [9, 9])
    engine.extend([*early, *late], [1, 1, 5, 2])
    engine.extend([*late, *early], [4, 3, 1, 1])
    engine.extend([early[1], late[1], early[0], late[0]], [1, 4, 1, 1])
    order = [*late, *early]
    while running := [req for req in order if len(req.output_ids) < NEW]:
        engine.decode(running)
        order.reverse()
    wanted = [plans["push"], None, plans["point"], plans["erase"].scoped("reply")]
    for req, plan in zip((*early, *late), wanted, strict=True):
        check(req, model, plan)


def test_rows_beyond_the_batch_are_nobodys(engine: Engine) -> None:
    """A captured graph runs on more rows than there are; those must not be steered by what a forward before left."""
    reqs = [engine.request(prompt(i), {"plan": "push", "scale": 2.0}) for i in range(3)]
    plain = engine.request(prompt(5))
    engine.extend([*reqs, plain], [9] * 4)
    steering = engine.runner.steerkern
    assert (steering.rows.slot[:27] >= 0).all()
    assert (steering.rows.slot[27:] == -1).all()
    addresses = [t.data_ptr() for n in steering.norms for t in (*n.tables, n.rows.slot)]
    padded = engine.decode(reqs[:1], padded=8)[1:]
    assert (steering.rows.slot[1:] == -1).all()
    engine.decode([plain], padded=8)
    assert (steering.rows.slot == -1).all()
    bare = engine.decode([plain], padded=8)[1:]
    assert torch.equal(padded, bare)
    assert addresses == [t.data_ptr() for n in steering.norms for t in (*n.tables, n.rows.slot)]


def test_prefixes_are_shared_by_requests_that_are_steered_alike(
    engine: Engine, model: LlamaForCausalLM, plans: dict[str, sk.Plan]
) -> None:
    ids = prompt(1, 12)
    asked: list[Any] = [{"plan": "push"}, None, {"plan": "push", "scale": 2}, {"plan": "erase"}]
    for wanted in asked:
        engine.generate([engine.request(ids, wanted, extra_key="mine")], NEW)
        assert engine.reused == 0
    for wanted in asked:
        req = engine.request(ids, wanted, extra_key="mine")
        assert engine.reused == 11
        assert req.extra_key.startswith("mine")
        engine.generate([req], NEW)
        plan = wanted and plans[wanted["plan"]].scaled(wanted.get("scale", 1))
        check(req, model, plan)
    engine.request(ids, {"plan": "push"})
    assert engine.reused == 0  # the caller's own key counts as before


def test_without_the_salt_a_plain_request_would_read_steered_keys(
    engine: Engine, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkern.integrations.sglang.plans.Variant.salt", lambda self, prompt: "")
    ids = prompt(1, 12)
    engine.generate([engine.request(ids, {"plan": "push"})], NEW)
    engine.radix = [(key or None, *rest) for key, *rest in engine.radix]
    req = engine.request(ids)
    engine.generate([req], NEW)
    assert engine.reused == 11
    assert (torch.stack(req.logits) - expected(model, ids, None)[1]).abs().max() > 0.1


@pytest.mark.parametrize(("name", "shared"), [("push", True), ("reply", False), ("both", False), ("point", False)])
def test_a_reply_is_shared_as_a_prompt_only_where_it_is_steered_as_one(
    engine: Engine, model: LlamaForCausalLM, plans: dict[str, sk.Plan], name: str, shared: bool
) -> None:
    first = engine.request(prompt(1), {"plan": name})
    engine.generate([first], NEW)
    turn = engine.request([*first.origin_input_ids, *first.output_ids, 5, 6], {"plan": name})
    assert (engine.reused > 0) == shared
    engine.generate([turn], NEW)
    check(turn, model, plans[name])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("push", 'steerkern must be an object such as {"plan": "name"}, got \'push\''),
        ({}, "steerkern must be an object"),
        ({"plan": "calm"}, "steerkern.plan must be one of 'push', 'erase', .* got 'calm'"),
        ({"plan": ["push"]}, "steerkern.plan must be one of"),
        ({"plan": "push", "layers": 3}, "steerkern has no field 'layers'; known are plan, scale, scope"),
        ({"plan": "push", "scale": "2"}, "steerkern.scale must be a number, got '2'"),
        ({"plan": "push", "scale": True}, "steerkern.scale must be a number, got True"),
        ({"plan": "push", "scale": None}, "steerkern.scale must be a number, got None"),
        ({"plan": "push", "scale": 0}, "steerkern.scale must be finite and not 0"),
        ({"plan": "push", "scale": float("nan")}, "steerkern.scale must be finite"),
        ({"plan": "push", "scale": 1e9}, "steerkern.scale must lie within -10000 and 10000, got 1e"),
        ({"plan": "push", "scope": "replies"}, "steerkern.scope must be 'all', 'prompt', 'decode', 'reply', got 'repl"),
        ({"plan": "push", "scope": 3}, "steerkern.scope must be"),
    ],
)
def test_a_bad_field_is_refused_where_the_request_arrives(engine: Engine, wanted: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        engine.request(prompt(1), wanted)
    assert "\n" not in str(caught.value)
    params = engine.fake.SamplingParams({"steerkern": wanted})  # and again where it is scheduled, without an exception
    req = engine.fake.Req("r", "", prompt(1), params)
    assert req.to_finish == str(caught.value)
    assert req.steerkern is None


def test_a_position_that_the_prompt_lacks_ends_that_request_only(engine: Engine, model: LlamaForCausalLM) -> None:
    short, other = engine.request([5], {"plan": "point"}), engine.request(prompt(2))
    assert short.to_finish == "position -2: the prompt of row 0 has 1 tokens"
    engine.generate([other, short], NEW)
    check(other, model, None)


def test_more_variants_than_fit_are_refused_until_others_end(
    engine: Engine, model: LlamaForCausalLM, plans: dict[str, sk.Plan]
) -> None:
    running = [engine.request(prompt(1), {"plan": "push", "scale": 1 + i / 128}) for i in range(AT_ONCE)]
    assert all(req.to_finish is None for req in running)
    assert engine.request(prompt(1), {"plan": "push", "scale": 1.0}).to_finish is None  # one of those
    refused = engine.request(prompt(1), {"plan": "push", "scale": 7})
    assert refused.to_finish == "64 other combinations of plan, scale and scope are running; try again later"
    for turn in range(3):  # more in all than the tables hold at once
        for req in running:
            req.done = True
        running = [engine.request(prompt(turn), {"plan": "push", "scale": 2 + turn + i / 128}) for i in range(AT_ONCE)]
        assert not any(req.to_finish for req in running)
        for first in range(0, AT_ONCE, 8):
            engine.extend(running[first : first + 8], [9] * 8)
    while len(running[-1].output_ids) < NEW:
        engine.decode(running[::-21])
    check(running[-1], model, plans["push"].scaled(4 + (AT_ONCE - 1) / 128))


# what is refused when the server starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculative_algorithm": "EAGLE"}, "server argument speculative_algorithm is 'EAGLE'; .* must be None"),
        ({"enable_dp_attention": True}, "server argument enable_dp_attention is True"),
        ({"tp_size": 2}, "pass --enforce-disable-flashinfer-allreduce-fusion"),
    ],
)
def test_server_arguments_that_move_rows_are_refused(
    fake: FakeSGLang, model: LlamaForCausalLM, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(sk.PlanError, match=message):
        Engine(fake, model, ServerArgs(**arguments))


def test_a_plan_of_another_model_stops_the_server(fake: FakeSGLang) -> None:
    with pytest.raises(sk.PlanError, match="has width 48, the model has 32"):
        Engine(fake, tiny_llama(hidden_size=32))
    with pytest.raises(sk.PlanError, match="layer 2: the model has 2 decoder layers"):
        Engine(fake, tiny_llama(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda v: sk.Plan(sk.probe(v), name="p"), "plan 'p' has a probe, which is not supported in SGLang"),
        (lambda v: sk.Plan(sk.add(v), site="resid_mid", name="p"), "plan 'p' writes resid_mid"),
        (lambda v: sk.Plan(sk.add(v), scope=sk.Tokens(after=(3,)), name="p"), "plan 'p' waits for an event"),
        (
            lambda v: sk.Plan(sk.add(v), latch=sk.Latch([sk.cast(v, 1, 0.1)]), name="p"),
            "plan 'p' decides from the prompt",
        ),
    ],
)
def test_plans_that_need_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Any, message: str
) -> None:
    FakeSGLang(monkeypatch)
    plan(torch.ones(WIDTH)).save_pretrained(tmp_path / "p")
    monkeypatch.setenv(sglang.VARIABLE, str(tmp_path / "p"))
    with pytest.raises(SystemExit, match=f"steerkern cannot steer this SGLang: {message}"):
        sglang.register()


def test_an_sglang_without_what_is_hooked_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plans: dict[str, sk.Plan]
) -> None:
    fake = FakeSGLang(monkeypatch)
    del fake.ModelRunner.init_cuda_graphs
    plans["push"].save_pretrained(tmp_path / "push")
    monkeypatch.setenv(sglang.VARIABLE, str(tmp_path / "push"))
    with pytest.raises(SystemExit, match="this SGLang has no .*init_cuda_graphs"):
        sglang.register()
    assert not fake.registry.hooks
    monkeypatch.setenv(sglang.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="none"):
        sglang.register()


def test_without_plans_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSGLang(monkeypatch)
    monkeypatch.delenv(sglang.VARIABLE, raising=False)
    sglang.register()
    assert not fake.registry.hooks


def test_steerkern_imports_without_sglang() -> None:
    code = "import steerkern.integrations.sglang.plugin, sys; assert 'sglang' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# what would steer nothing, or something else, raises in the first forward


def test_a_norm_that_reads_another_tensor_is_found_out(engine: Engine) -> None:
    """As in gemma3n, whose ``input_layernorm`` is fed with one prediction of several."""
    block = engine.runner.model.model.layers[2]
    norm = block.input_layernorm
    block.__class__ = type("Stacked", (type(block),), {"forward": lambda self, p, x, b, r: (x + norm(1 * (x + r)), r)})
    with pytest.raises(sk.PlanError, match=r"resid_pre\[2\]: its norm reads another tensor than the residual stream"):
        engine.extend([engine.request(prompt(1))], [9])


def test_a_norm_that_is_gone_past_is_found_out(engine: Engine) -> None:
    """As by a kernel that reduces, adds and normalises in one, with the norm's weight."""
    block = engine.runner.model.model.layers[1]
    native = block.input_layernorm.forward_native
    block.__class__ = type("Fusing", (type(block),), {"forward": lambda self, p, x, b, r: (native(x, r)[0], x + r)})
    with pytest.raises(sk.PlanError, match=r"resid_pre\[1\]: the norm was not called, SGLang fuses it into another"):
        engine.extend([engine.request(prompt(1))], [9])


def test_a_norm_that_gets_some_of_the_rows_is_found_out(engine: Engine) -> None:
    """As with sequence parallelism, where each rank normalises its share."""
    req = engine.request(prompt(1), {"plan": "push"})
    engine.extend([req], [5])
    norm = engine.runner.model.model.norm
    norm.register_forward_pre_hook(lambda _, args: tuple(arg[:2] for arg in args))
    with pytest.raises(sk.PlanError, match=r"resid_post\[3\]: its norm gets 2 of the 4 rows"):
        engine.extend([req], [4])


def test_forwards_of_another_kind_are_refused(engine: Engine) -> None:
    req = engine.request(prompt(1), {"plan": "push"})
    with pytest.raises(sk.PlanError, match="a forward of kind TARGET_VERIFY: steerkern knows EXTEND, MIXED and DECODE"):
        engine._run([req], [3], ForwardMode.TARGET_VERIFY)
    batch = engine.fake.ForwardBatch(ForwardMode.DECODE, torch.tensor([1]), torch.tensor([0]), ["r"], torch.tensor([1]))
    with pytest.raises(sk.PlanError, match="SGLang rebuilt the batch"):
        engine.runner.forward(batch)
    with pytest.raises(sk.PlanError, match=r"a forward of 150 rows, the row map has 136"):
        engine.extend([engine.request(prompt(1, 150), {"plan": "push"})], [150])


def test_an_unknown_norm_is_refused_by_what_it_does(fake: FakeSGLang, model: LlamaForCausalLM) -> None:
    stacked = ForCausalLM(model)
    norm = stacked.model.layers[1].input_layernorm
    wide = lambda self, x, residual=None: (x, (x + residual).double())  # noqa: E731 keeps its residual in another dtype
    norm.__class__ = type("Wide", (type(norm),), {"forward_native": wide})
    with pytest.raises(sk.PlanError, match=r"resid_pre\[1\]: its norm is a Wide of a kind that steerkern does not"):
        norms.recognise_norm(sk.Site(1, "resid_pre"), norm)
    stacked.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(sk.PlanError, match="ForCausalLM has 0 decoders whose blocks have an input_layernorm"):
        norms.examine(stacked)


# the norms


def test_only_norms_that_a_plan_writes_are_replaced(model: LlamaForCausalLM, plans: dict[str, sk.Plan]) -> None:
    stacked = ForCausalLM(model)
    steering = Steering(stacked, Plans([plans["push"], plans["last"]]), 64)
    assert [str(norm.site) for norm in steering.norms] == ["resid_pre[1]", "resid_pre[2]", "resid_post[3]"]
    replaced = [module for module in stacked.modules() if "forward" in vars(module)]
    assert replaced == [stacked.model.layers[1].input_layernorm, stacked.model.layers[2].input_layernorm,
                        stacked.model.norm]  # fmt: skip
    steering.detach()
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in stacked.modules())


def test_other_pipeline_ranks_hold_the_other_norms(model: LlamaForCausalLM, plans: dict[str, sk.Plan]) -> None:
    stacked = ForCausalLM(model)
    stacked.model.layers[0], stacked.model.layers[1], stacked.model.norm = (torch.nn.Identity() for _ in range(3))
    steering = Steering(stacked, Plans([plans["push"], plans["last"]]), 64)
    assert [str(norm.site) for norm in steering.norms] == ["resid_pre[2]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_a_replaced_norm_is_the_stock_one_with_its_sum_edited(dtype: torch.dtype, compiled: bool) -> None:
    """Steered rows equal the edit between sum and norm, others the stock norm, up to the rounding of the sum."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    stacked = ForCausalLM(tiny_llama().to(dtype))
    norm = stacked.model.layers[2].input_layernorm
    steering = Steering(stacked, Plans([sk.Plan(sk.add(vector), layers=2, name="push")]), 64)
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    variant = Plans([sk.Plan(sk.add(vector), layers=2, name="push")]).variant({"steerkern": {"plan": "push"}})
    assert variant is not None
    request = Request(variant, 8, "request 'r'")
    for held, steered in [([(request, 0, 3), (None, 0, 2)], [0, 1, 2]), ([(None, 2, 1), (request, 3, 1)], [1])]:
        steering.fill(held)
        count = sum(tokens for _, _, tokens in held) + 2  # padded
        x, residual, more = torch.randn(3, count, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
        edit = torch.zeros(count, WIDTH)
        edit[steered] = vector
        total = ((x.float() + (residual + more).float()).to(dtype) + edit).to(dtype)
        normed, kept = call(x.clone(), residual.clone(), more)
        near = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(kept, total, **near)
        torch.testing.assert_close(normed, norm.forward_native(total), **near)
        entering = total.clone()  # the first block's norm keeps what it is given
        steering.norms[0].streams = None
        torch.testing.assert_close(call(entering), norm.forward_native(entering), **near)
        torch.testing.assert_close(entering, (total + edit).to(dtype), **near)
    steering.rows.finish()
    assert torch.equal(norm(x[:0], residual[:0])[1], residual[:0])
