"""Residual sums made by the norm's kernel: the same bits as without, in every mode, and nobody's tensor overwritten."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import steerkern as sk
from steerkern.ops.dispatch import backends
from steerkern.runtime.blocks import add_norm, find_sums, hooked, rewritten
from steerkern.runtime.points import NormPoint
from steerkern.runtime.rewriting import rewrite
from tests.runtime.families import FAMILIES, build
from tests.runtime.models import LAYERS, WIDTH, tiny_llama

pytestmark = pytest.mark.skipif(bool(backends()["cpu"]), reason=backends()["cpu"] or "-")


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernel made the sum, for each that it was asked for."""
    made: list[bool] = []
    stock = NormPoint.add

    def add(self: NormPoint, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        both = stock(self, left, right)
        made.append(both is not None)
        return both

    monkeypatch.setattr(NormPoint, "add", add)
    return made


def plan(vector: Tensor, site: str = "resid_pre") -> sk.Plan:
    return sk.Plan(sk.ablate(vector), name="open", site=site)


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def test_llama_has_its_sums_made(model: LlamaForCausalLM, ids: Tensor, vector: Tensor, sums: list[bool]) -> None:
    with sk.steer(model, plan(vector)) as session:
        assert [block.norms for block in session.blocks] == [("post_attention_layernorm",)] * LAYERS
        logits(model, ids)
    assert sums == [True] * LAYERS
    assert all(type(layer) is LlamaDecoderLayer for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid"])
def test_the_bits_are_those_of_the_norms_alone(ids: Tensor, vector: Tensor, dtype: torch.dtype, site: str) -> None:
    model = tiny_llama().to(dtype)
    found = {}
    for fuse in ("norms", "all"):
        with sk.steer(model, plan(vector, site), fuse=fuse):
            out = model.generate(ids, attention_mask=(ids != 5).long(), max_new_tokens=6, do_sample=False)
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            found[fuse] = [out, *states, logits(model, ids)]
    assert all(torch.equal(a, b) for a, b in zip(found["norms"], found["all"], strict=True))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "glm4", "mixtral", "gpt_oss", "bamba", "recurrent_gemma",
                                  "granite", "mpt", "qwen3_next", "starcoder2", "llama4_text", "jamba"])  # fmt: skip
def test_other_families_have_them_too(name: str, sums: list[bool]) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    one = plan(torch.randn(model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1)))
    with sk.steer(model, one, fuse="norms"):
        expected = logits(model, ids, use_cache=False)
    assert not sums
    with sk.steer(model, one) as session:
        assert torch.equal(logits(model, ids, use_cache=False), expected)
        count = sum(len(block.norms) for block in session.blocks)
    assert count > 0
    assert sums == [True] * count


def test_blocks_without_such_a_sum_say_why() -> None:
    model = build(next(family for family in FAMILIES if family.name == "cohere"))
    with sk.steer(model, plan(torch.randn(model.config.hidden_size)), silent="ignore") as session:
        assert {block.norms for block in session.blocks} == {()}
        assert {block.reason for block in session.blocks} == {"it has no sum that goes straight into a norm"}


def test_a_forward_of_ones_own_is_left_alone(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    layer = model.model.layers[1]
    seen = []

    def forward(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Any:
        seen.append(hidden_states.shape)
        return type(self).forward(self, hidden_states, **kwargs)

    layer.forward = types.MethodType(forward, layer)
    with sk.steer(model, plan(vector)) as session:
        logits(model, ids)
        assert session.blocks[1].reason == "its forward was replaced"
    assert seen[-1] == (*ids.shape, WIDTH)  # the probe at attach was seen too
    assert "forward" in vars(layer)


def test_a_bound_forward_left_on_a_block_goes_with_the_session(model: LlamaForCausalLM, vector: Tensor) -> None:
    layer = model.model.layers[1]
    session = sk.steer(model, plan(vector), silent="ignore")
    layer.forward = layer.forward  # as transformers 4.57 does where hidden states are collected
    session.detach()
    assert "forward" not in vars(layer)
    assert layer.forward.__func__ is LlamaDecoderLayer.forward


def test_a_source_that_is_not_what_runs_is_refused() -> None:
    def other(self: Any, x: Tensor) -> Tensor:
        h = x + x
        h = self.norm(h)
        return h * 2.0

    assert not isinstance(rewrite(other, add_norm), str)
    constants = tuple(3.0 if value == 2.0 else value for value in other.__code__.co_consts)
    stale = types.FunctionType(other.__code__.replace(co_consts=constants), globals())
    assert rewrite(stale, add_norm) == "the source of its forward is not there, or is not what runs"
    assert rewrite(eval("lambda self, x: self.norm(x + x)"), add_norm) == (
        "the source of its forward is not there, or is not what runs"
    )
    captured = 1.0

    def closure(self: Any, x: Tensor) -> Tensor:
        h = x + captured
        h = self.norm(h)
        return h

    assert rewrite(closure, add_norm) == "its forward is not a plain Python function"


def test_a_wrapper_that_would_be_lost_is_refused() -> None:
    import functools

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x + x
            h = self.norm(h)
            return h

    assert not isinstance(rewritten(Block), str)

    class Wrapped(nn.Module):
        forward = functools.wraps(Block.forward)(lambda self, x: Block.forward(self, x) + 1.0)

    assert rewritten(Wrapped) == "something is wrapped around its forward"


@pytest.mark.parametrize(
    ("statements", "names"),
    [
        ("h = r + x; r = h; h = self.n(h)", "hr"),
        ("h = x + r; y = self.n(h); r = h", "hry"),
        ("r = r + x; h = self.n(r)", "hr"),
        ("h = r + x; r = h; y = self.n(r)", "hry"),
        ("h = r + x; h = self.n(h)", "h"),
        ("h = (r + x) + self.n(x); y = self.n(h)", "hy"),
    ],
)
def test_every_order_of_the_statements_means_the_same(statements: str, names: str, tmp_path: Any) -> None:
    import importlib.util

    lines = "".join(f"        {line.strip()}\n" for line in statements.split(";"))
    source = f"class Block:\n    def forward(self, r, x):\n{lines}        return {', '.join(names)},\n"
    (tmp_path / "made.py").write_text(source)
    spec = importlib.util.spec_from_file_location("made", tmp_path / "made.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []

    def counted(left: Tensor, right: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(norm)
        return left + right, norm(left + right)

    made = rewrite(module.Block.forward, counted)
    assert not isinstance(made, str)
    assert made.norms == ("n",)
    block = types.SimpleNamespace(n=lambda t: 3.0 * t)
    r, x = torch.randn(5), torch.randn(5)
    ours, theirs = made.forward(block, r, x), module.Block.forward(block, r, x)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_hook_keeps_is_not_overwritten(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, sums: list[bool]
) -> None:
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with sk.steer(model, plan(vector)):
        for name in ("", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
            part = model.model.layers[1].get_submodule(name)

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                kept.setdefault(name, []).append((output, output.clone()))

            part.register_forward_hook(keep)
        logits(model, ids)
        states = [layer for layer in kept if layer]
        assert sums == [True] * LAYERS
    assert set(kept) == {"", *states}
    assert len(states) == 3
    assert all(torch.equal(*kept[name][0]) for name in states)
    # the block's output is the next site's tensor, which is edited in place, with and without fused sums
    assert not torch.equal(*kept[""][0])


def test_a_norm_given_a_forward_while_steered_runs_it(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    norm, seen = model.model.layers[1].post_attention_layernorm, []
    with sk.steer(model, plan(vector)):
        expected, stock = logits(model, ids), norm.forward

        def forward(hidden_states: Tensor) -> Tensor:
            seen.append(hidden_states)
            return stock(hidden_states)

        norm.forward = forward
        assert torch.equal(logits(model, ids), expected)
        del norm.forward
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
def test_a_hook_on_the_norm_runs(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, sums: list[bool], kind: str
) -> None:
    norm, seen = model.model.layers[1].post_attention_layernorm, []
    with sk.steer(model, plan(vector)):
        expected = logits(model, ids)
        sums.clear()
        if kind == "forward":
            handle = norm.register_forward_hook(lambda module, args, output: seen.append(module))
        elif kind == "pre":
            handle = norm.register_forward_pre_hook(lambda module, args: seen.append(module))
        else:
            handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        assert torch.equal(logits(model, ids), expected)
        handle.remove()
        assert norm in seen
        assert len(sums) == (0 if kind == "global" else LAYERS - 1)


def test_every_kind_of_hook_counts() -> None:
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        norm = nn.LayerNorm(4)
        assert not hooked(norm)
        getattr(norm, f"register_{register}")(lambda *args: None)
        assert hooked(norm)
        handle = getattr(nn.modules.module, f"register_module_{register}")(lambda *args: None)
        assert hooked(nn.LayerNorm(4))
        handle.remove()
        assert not hooked(nn.LayerNorm(4))


def test_gradients_are_those_without_fused_sums(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, sums: list[bool]
) -> None:
    found = {}
    for fuse in ("norms", "all"):
        with sk.steer(model, plan(vector), fuse=fuse):
            model.zero_grad()
            model(ids).logits.square().sum().backward()
            found[fuse] = [parameter.grad.clone() for parameter in model.parameters()]
    assert not any(sums)
    assert all(torch.equal(a, b) for a, b in zip(found["norms"], found["all"], strict=True))


def test_a_probe_in_the_middle_reads_the_sum(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    read = {}
    for fuse in ("norms", "all"):
        with sk.steer(model, sk.Plan(sk.probe(vector), site="resid_mid", name="look"), fuse=fuse) as session:
            logits(model, ids)
            read[fuse] = session.readings("look")
    assert read["norms"].keys() == read["all"].keys()
    assert len(read["all"]) == LAYERS
    assert all(torch.equal(read["all"][site], read["norms"][site]) for site in read["all"])


def test_nested_sessions_both_edit_and_leave_in_any_order(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, sums: list[bool]
) -> None:
    other = nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)), dim=0)
    plain = logits(model, ids)
    for fuse in ("all", "none"):
        for order in (0, 1):
            expected = None
            for inner in ("norms", "all"):
                sessions = [
                    sk.steer(model, plan(other, "resid_mid"), fuse=fuse, silent="ignore"),
                    sk.steer(model, plan(vector, "resid_mid"), fuse=inner, silent="ignore"),
                ]
                found = logits(model, ids)
                expected = found if expected is None else expected
                assert torch.equal(found, expected)
                sessions.pop(order).detach()
                logits(model, ids)
                sessions.pop().detach()
                assert torch.equal(logits(model, ids), plain)


def test_compiled_with_fused_sums(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, plan(vector), fuse="norms"):
        expected = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with sk.steer(model, plan(vector)):
        torch.testing.assert_close(logits(compiled, ids), expected, atol=2e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_weights_cast_after_attaching(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    with sk.steer(model, plan(vector)):
        logits(model, ids)
        model.to(torch.bfloat16)
        found = logits(model, ids)
    with sk.steer(model, plan(vector), backend="reference"):
        torch.testing.assert_close(found, logits(model, ids), atol=0.1 * float(found.abs().max()), rtol=0.0)


def test_summands_that_broadcast_are_added_by_torch(model: LlamaForCausalLM, vector: Tensor) -> None:
    with sk.steer(model, plan(vector), silent="ignore"), torch.no_grad():
        norm = model.model.layers[0].post_attention_layernorm
        for left, right in (((1, 2, WIDTH), (2, 1, WIDTH)), ((2, WIDTH), (WIDTH,)), ((2, 3, WIDTH), (2, 3, WIDTH))):
            one, other = torch.randn(left), torch.randn(right)
            total, out = add_norm(one, other, norm)
            assert torch.equal(total, one + other)
            assert torch.equal(out, norm(one + other))
        doubled, _ = add_norm(one, one.to(torch.bfloat16), norm)
        assert doubled.dtype == torch.float32
        strided = torch.randn(3, 2, WIDTH).transpose(0, 1)
        assert torch.equal(add_norm(one, strided, norm)[0], one + strided)


def test_other_backends_leave_the_sums(model: LlamaForCausalLM) -> None:
    (first, *_) = find_sums(model.model.layers, [], "reference")
    assert first.reason == "backend reference has no kernel that makes a new sum"
