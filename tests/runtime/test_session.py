"""Attach, detach, rows, run-time changes, receipts and errors of a session."""

from __future__ import annotations

import copy
import gc
import io
import tracemalloc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import steerkern as sk
from tests.runtime.models import LAYERS, WIDTH, hooked, tiny_llama

ALL_FUSE = ["all", "sites", "none"]


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def anatomy_of(model: nn.Module) -> list[object]:
    """Everything that attaching could leave behind: classes, attributes, hooks, and the bits of the weights."""
    found: list[object] = []
    for name, module in model.named_modules():
        state = {k: v for k, v in vars(module).items() if not k.startswith("_") or k.startswith("_steerkern")}
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks") and hasattr(v, "__len__")]
        found.append((name, type(module), sorted(map(str, state)), hooks, list(module._modules)))
    found.extend((name, t.data_ptr(), t._version, t.dtype) for name, t in model.state_dict(keep_vars=True).items())
    return found


def add(vector: Tensor, **options: object) -> sk.Plan:
    return sk.Plan(sk.add(vector, 4.0), **{"layers": [1], "name": "push", **options})


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_steered_logits_equal_a_plain_hook(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str, fuse: str
) -> None:
    plain = logits(model, ids)
    with hooked(model, 1, lambda h: h + 4.0 * vector):
        expected = logits(model, ids)
    with sk.steer(model, add(vector), backend=backend, fuse=fuse):
        steered = logits(model, ids)
    assert not torch.allclose(steered, plain, atol=0.1)
    if backend == "reference":
        assert torch.equal(steered, expected)
    else:  # norm sums in another order: ulps of a state of size 5 through four layers
        torch.testing.assert_close(steered, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_models(ids: Tensor, vector: Tensor, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    with hooked(model, 1, lambda h: h + (4.0 * vector).to(dtype)):
        expected = logits(model, ids)
    with sk.steer(model, add(vector), backend="reference" if dtype == torch.float64 else None):
        steered = logits(model, ids)
    tolerance = 1e-6 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(steered, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_detach_restores_the_model_bit_for_bit(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, fuse: str) -> None:
    before, plain = anatomy_of(model), logits(model, ids)
    with sk.steer(model, add(vector, layers="all"), fuse=fuse):
        assert anatomy_of(model) != before
        logits(model, ids)
    assert anatomy_of(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_an_exception_inside_the_block_leaves_the_model_stock(model: LlamaForCausalLM, vector: Tensor) -> None:
    before = anatomy_of(model)
    with pytest.raises(ZeroDivisionError), sk.steer(model, add(vector)):
        raise ZeroDivisionError
    assert anatomy_of(model) == before


def test_an_exception_inside_a_forward_leaves_the_model_usable(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor
) -> None:
    before = anatomy_of(model)
    with sk.steer(model, add(vector)):
        expected = logits(model, ids)
        with pytest.raises(IndexError):
            logits(model, ids + 10_000)
        assert torch.equal(logits(model, ids), expected)
    assert anatomy_of(model) == before


@pytest.mark.parametrize("fails_at", range(11))
def test_attach_is_complete_or_nothing(
    model: LlamaForCausalLM, vector: Tensor, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from steerkern.runtime import session

    before, done, real = anatomy_of(model), [], session.attach

    def fail(*args: object) -> None:
        if len(done) == fails_at:
            raise RuntimeError("no")
        done.append(args)
        real(*args)

    monkeypatch.setattr(session, "attach", fail)
    with pytest.raises(RuntimeError, match="no"):
        sk.steer(model, add(vector))
    assert len(done) == fails_at
    assert anatomy_of(model) == before


def test_nested_sessions_act_in_the_order_of_attachment(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str
) -> None:
    other = torch.nn.functional.normalize(torch.arange(WIDTH) - 20.5, dim=0)

    def both(h: Tensor) -> Tensor:
        h = h + 4.0 * vector
        return h - (h @ other)[..., None] * other

    with hooked(model, 1, both):
        expected = logits(model, ids)
    push, cut = add(vector), sk.Plan(sk.ablate(other), layers=[1], name="cut")
    with sk.steer(model, push, backend=backend), sk.steer(model, cut, backend=backend):
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_sessions_detach_in_any_order(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, order: tuple[int, ...]
) -> None:
    before, plain = anatomy_of(model), logits(model, ids)
    fuses = ["all", "none", "sites"]
    sessions = [sk.steer(model, add(vector * (i + 1)), fuse=fuse) for i, fuse in enumerate(fuses)]
    left = set(range(3))
    for i in order:
        factor = 4.0 * sum(j + 1 for j in left)
        with hooked_clean(vector, factor) as reference:
            torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=2e-4, rtol=1e-4)
        sessions[i].detach()
        left.discard(i)
    assert anatomy_of(model) == before
    assert torch.equal(logits(model, ids), plain)


class hooked_clean:
    """A second, stock model with the same weights and a hook."""

    def __init__(self, vector: Tensor, factor: float) -> None:
        self.model = tiny_llama()
        self.hook = hooked(self.model, 1, lambda h: h + factor * vector)

    def __enter__(self) -> nn.Module:
        self.hook.__enter__()
        return self.model

    def __exit__(self, *error: object) -> None:
        self.hook.__exit__(None, None, None)


def test_detaching_twice_does_nothing(model: LlamaForCausalLM, vector: Tensor) -> None:
    session = sk.steer(model, add(vector))
    session.detach()
    before = anatomy_of(model)
    session.detach()
    assert not session.attached
    assert anatomy_of(model) == before


def test_no_class_keeps_state(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    twin, classes = tiny_llama(), {type(m): dict(vars(type(m))) for m in model.modules()}
    plain = logits(twin, ids)
    with sk.steer(model, add(vector)):
        assert torch.equal(logits(twin, ids), plain)
        assert {cls: dict(vars(cls)) for cls in classes} == classes
        assert type(model).__name__ == "LlamaForCausalLM"
        assert isinstance(model, LlamaForCausalLM)
        logits(model, ids)


def test_a_detached_session_is_garbage(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, add(vector)) as session:
        logits(model, ids)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


def test_a_session_takes_little_memory(ids: Tensor, vector: Tensor) -> None:
    model = tiny_llama(num_hidden_layers=8)
    tracemalloc.start()
    with sk.steer(model, add(vector, layers="all")) as session:
        logits(model, ids)
        python_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tables = sum(t.nbytes for t in session._program.tables(0)[:3]) + session._rows.slot.nbytes
    assert python_bytes + tables < 1 << 20


def test_copying_or_pickling_a_steered_model_raises(model: LlamaForCausalLM, vector: Tensor) -> None:
    with sk.steer(model, add(vector), silent="ignore"):
        for attempt in (lambda: copy.deepcopy(model), lambda: torch.save(model, io.BytesIO())):
            with pytest.raises(sk.PlanError, match="LlamaForCausalLM is being steered; detach"):
                attempt()
    copy.deepcopy(model)


def test_weights_saved_while_steered_are_the_stock_ones(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, tmp_path: object
) -> None:
    plain = logits(model, ids)
    with sk.steer(model, add(vector), silent="ignore"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval(), ids), plain)


def test_a_replaced_weight_is_read_anew(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, add(vector)):
        logits(model, ids)
        norm = model.model.layers[1].input_layernorm
        norm.weight = nn.Parameter(torch.full((WIDTH,), 0.5))
        steered = logits(model, ids)
    with hooked(model, 1, lambda h: h + 4.0 * vector):
        torch.testing.assert_close(steered, logits(model, ids), atol=2e-4, rtol=1e-4)


# rows


def test_each_row_gets_its_own_plans(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str) -> None:
    plans = [add(vector, name="push"), add(vector, name="pull").scaled(-1.0)]
    solo = {}
    for plan in plans:
        with sk.steer(model, plan, backend=backend):
            solo[plan.name] = logits(model, ids)
    with sk.steer(model, plans, backend=backend) as session:
        session.rows(["pull", None, plans[0]])
        mixed = logits(model, ids)
        assert session.receipt()["push"].rows == {2: [(0, 8)]}
        assert session.receipt()["pull"].rows == {0: [(0, 8)]}
        session.rows(None)
        both = logits(model, ids)
    torch.testing.assert_close(mixed[0], solo["pull"][0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], logits(model, ids)[1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[2], solo["push"][2], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(both, logits(model, ids), atol=2e-4, rtol=1e-4)  # push and pull cancel


def test_rows_without_a_plan_keep_their_bits(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    plain = logits(model, ids)
    with sk.steer(model, add(vector), fuse="none") as session:
        session.rows([None, "push", None])
        mixed = logits(model, ids)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.equal(mixed[1], plain[1])


def test_rows_that_do_not_fit_raise(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, add(vector), silent="ignore") as session:
        with pytest.raises(sk.PlanError, match="no plan 'puhs' in this session; known are 'push'"):
            session.rows(["puhs", None, None])
        with pytest.raises(TypeError, match="one entry per sequence"):
            session.rows("push")  # type: ignore[arg-type]
        session.rows(["push"] * 4)
        with pytest.raises(sk.PlanError, match="rows name 4 sequences, the batch has 3 prompts"):
            logits(model, ids)


# run-time changes


def test_scale_changes_the_next_forward(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str) -> None:
    with sk.steer(model, add(vector), backend=backend) as session:
        session.set("push", scale=0.5)
        half = logits(model, ids)
        session.set("push", scale=0.0)
        torch.testing.assert_close(logits(model, ids), plain := logits(tiny_llama(), ids), atol=2e-4, rtol=1e-4)
        with pytest.raises(sk.PlanError, match="scale of plan 'push' must be finite in float32, got nan"):
            session.set("push", scale=float("nan"))
        with pytest.raises(sk.PlanError, match="no plan 'pull' in this session"):
            session.set("pull", scale=1.0)
    with hooked(model, 1, lambda h: h + 2.0 * vector):
        torch.testing.assert_close(half, logits(model, ids), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(half, plain, atol=0.1)


def test_plans_come_and_go_while_attached(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    plain = logits(model, ids)
    with sk.steer(model, add(vector), silent="ignore") as session:
        pushed = logits(model, ids)
        session.add(sk.Plan(sk.add(vector, -4.0), layers=[1], name="pull"))
        torch.testing.assert_close(logits(model, ids), plain, atol=2e-4, rtol=1e-4)
        session.remove("pull")
        assert torch.equal(logits(model, ids), pushed)
        with pytest.raises(sk.PlanError, match="plan 'push' is in this session already"):
            session.add(add(vector))
        session.rows(["push", None, None])
        with pytest.raises(sk.PlanError, match="plan 'push' is assigned to rows"):
            session.remove("push")
        session.rows(None)
        session.remove("push")
        torch.testing.assert_close(logits(model, ids), plain, atol=2e-4, rtol=1e-4)


# receipts


def test_a_plan_that_never_fires_is_an_error(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with (
        pytest.raises(sk.PlanError, match="plan 'late' wrote no token"),
        sk.steer(model, add(vector, scope="decode", name="late")),
    ):
        logits(model, ids)
    with pytest.raises(sk.PlanError, match="plan 'push' wrote no token"), sk.steer(model, add(vector)):
        pass
    with pytest.warns(UserWarning, match="plan 'push' wrote no token"), sk.steer(model, add(vector), silent="warn"):
        pass
    with sk.steer(model, add(vector), silent="ignore"):
        pass


def test_the_receipt_names_sites_rows_and_tokens(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    plan = add(vector, layers=[0, 1, 3], scope=(-1, 0)) + sk.Plan(
        sk.ablate(vector), site="resid_post", layers=[LAYERS - 1]
    )
    with sk.steer(model, plan.named("mix")) as session:
        logits(model, ids)
        receipt = session.receipt()
    assert [str(s) for s in receipt["mix"].sites] == ["resid_pre[0]", "resid_pre[1]", "resid_pre[3]", "resid_post[3]"]
    assert receipt["mix"].tokens == 27
    assert str(receipt).startswith("mix: 27 tokens at resid_pre[0-1, 3] and resid_post[3]; row 0: tokens 0-8; row 1:")
    assert receipt.to_json()["mix"]["rows"]["2"] == [[0, 8]]


# bad input


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda v: add(v, layers=[40]), r"layer 40: the model has 4 decoder layers \(0..3\), plan 'push'"),
        (lambda v: add(torch.ones(7)), "plan 'push' has width 7, the model has 48"),
        (
            lambda v: sk.Plan(
                sk.add(sk.Directions.of({1: v}, model=sk.Fingerprint("gpt2", WIDTH, 12))[1]), name="push"
            ),
            r"plan 'push' was made for gpt2 \(12 layers, width 48\), the model is llama \(4 layers, width 48\)",
        ),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(
    model: LlamaForCausalLM, vector: Tensor, plan: object, message: str
) -> None:
    before = anatomy_of(model)
    with pytest.raises(sk.PlanError, match=message):
        sk.steer(model, [add(vector, name="fine"), plan(vector)])  # type: ignore[operator]
    assert anatomy_of(model) == before


def test_arguments_of_steer(model: LlamaForCausalLM, vector: Tensor) -> None:
    with pytest.raises(sk.BackendError, match="backend 'gpu': known are"):
        sk.steer(model, add(vector), backend="gpu")
    with pytest.raises(ValueError, match="fuse must be"):
        sk.steer(model, add(vector), fuse="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="silent must be"):
        sk.steer(model, add(vector), silent="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a session takes plans, got Tensor"):
        sk.steer(model, [vector])  # type: ignore[list-item]


def test_a_slot_outside_the_tables_raises_and_writes_nothing(model: LlamaForCausalLM, vector: Tensor) -> None:
    with sk.steer(model, add(vector), silent="ignore") as session:
        state = torch.randn(2, 1, WIDTH)
        kept = state.clone()
        session._rows.slot[:2] = torch.tensor([0, 64], dtype=torch.int32)
        session._rows.count, session._rows.pointer = 2, session._rows.slot.data_ptr()
        with torch.no_grad(), pytest.raises(sk.PlanError, match=r"slot 64: the program has 64 slots"):
            model.model.layers[1].input_layernorm(state)
        assert torch.equal(state, kept)


# gradients


@pytest.mark.parametrize("fuse", ALL_FUSE)
def test_gradients_flow_through_the_edit(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, fuse: str) -> None:
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with hooked(model, 1, lambda h: h - (h @ vector)[..., None] * vector):
        expected = gradients()
    with sk.steer(model, sk.Plan(sk.ablate(vector), layers=[1]), fuse=fuse):
        steered = gradients()
    for ours, theirs in zip(steered, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)


def test_gradient_checkpointing_raises_rather_than_being_wrong(ids: Tensor, vector: Tensor) -> None:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with sk.steer(model, add(vector)), pytest.raises(RuntimeError):
        model(ids, labels=ids, use_cache=False).loss.backward()


def test_soft_prompts_get_gradients_and_are_not_written(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    kept = embeds.detach().clone()
    with sk.steer(model, add(vector, layers=[0])):
        model(inputs_embeds=embeds).logits.sum().backward()
    assert torch.equal(embeds.detach(), kept)
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


# sites


def test_probe_sites_have_their_names(model: LlamaForCausalLM, vector: Tensor) -> None:
    with sk.steer(model, add(vector), silent="ignore") as session:
        names = [str(found.site) for found in session.anatomy.sites]
    pre, mid = ([f"resid_{name}[{i}]" for i in range(LAYERS)] for name in ("pre", "mid"))
    assert names == [*pre, *mid, f"resid_post[{LAYERS - 1}]"]


def test_resid_post_is_the_next_blocks_resid_pre(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, add(vector, layers=[2])):
        expected = logits(model, ids)
    with sk.steer(model, add(vector, layers=[1], site="resid_post")):
        assert torch.equal(logits(model, ids), expected)
