"""What examine finds, that it finds it by structure, and that it leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import steerkern as sk
from steerkern.ops.schemas import Norm
from steerkern.runtime.norms import recognise
from steerkern.runtime.sites import Anatomy, examine
from tests.runtime.models import LAYERS, tiny_llama

WIDTH = 16


class Block(nn.Module):
    """``h + mix(norm(h))``, in the variations below."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.other = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mix(self.norm(h))


class Decoder(nn.Module):
    """The least that counts as a transformers decoder."""

    def __init__(self, block: type[nn.Module] = Block, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=4, num_hidden_layers=layers, vocab_size=20)
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        h = self.embed(input_ids)
        for block in self.layers:
            h = block(h)
        return self.norm(h)


def block_of(forward: Callable[[Any, Tensor], Tensor], **parts: Callable[[], nn.Module]) -> type[nn.Module]:
    def init(self: Any) -> None:
        Block.__init__(self)
        for name, make in parts.items():
            setattr(self, name, make())

    return type("BlockOf", (Block,), {"__init__": init, "forward": forward})


def keeps_a_clone(self: Any, h: Tensor) -> Tensor:
    kept = h.clone()
    return kept + self.mix(self.norm(h))


def keeps_a_concatenation(self: Any, h: Tensor) -> Tensor:
    both = torch.cat([h, h], -1)
    return h + self.mix(self.norm(h)) + both[..., :WIDTH]


def takes_a_mean(self: Any, h: Tensor) -> Tensor:
    mean = h.mean(-1, keepdim=True)
    return h + self.mix(self.norm(h)) + mean


def scales_in_place(self: Any, h: Tensor) -> Tensor:
    h *= 2.0
    return h + self.mix(self.norm(h))


def casts(self: Any, h: Tensor) -> Tensor:
    return h + self.mix(self.norm(h.double().float()))


def norms_the_last_token(self: Any, h: Tensor) -> Tensor:
    return h + self.mix(self.norm(h[:, -1:]))


def norms_transposed(self: Any, h: Tensor) -> Tensor:
    return h + self.mix(self.norm(h.transpose(0, 1))).transpose(0, 1)


def mixes_without_a_norm(self: Any, h: Tensor) -> Tensor:
    return self.norm(h + self.mix(h))


def norms_twice(self: Any, h: Tensor) -> Tensor:
    return h + self.norm(self.mix(self.norm(h)))


def views(self: Any, h: Tensor) -> Tensor:
    kept = h
    flat = h.view(-1, WIDTH)
    return kept + self.mix(self.norm(flat)).view_as(kept)


def reads_with_two_norms(self: Any, h: Tensor) -> Tensor:
    return h + self.mix(self.other(h)) + self.norm(h)


def drops_out(self: Any, h: Tensor) -> Tensor:
    dropped = F.dropout(h, 0.5, self.training)
    return dropped + self.mix(self.norm(dropped))


def norms_inside_a_part(self: Any, h: Tensor) -> Tensor:
    return h + self.mix(self.inner(h))


def sums_through_a_part(self: Any, h: Tensor) -> Tensor:
    return h + self.inner(self.norm(h))


class Scaled(nn.Module):
    """Called a norm, built like one, and not one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.abs().mean(-1, keepdim=True) + self.variance_epsilon)


class Doubtful(nn.Module):
    """Does not take zeros, which stand in for what a part returned."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.any()):
            raise ZeroDivisionError
        return x / x.abs().max()


class Wrapped(nn.Sequential):
    """A norm with something after it."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Tanh())


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


BLOCKS = {
    "plain": (Block, "norm"),
    "views": (block_of(views), "norm"),
    "two-norms": (block_of(reads_with_two_norms), "other"),
    "wrapped-norm": (block_of(norms_inside_a_part, inner=Wrapped), "inner.0"),
    "part-without-zeros": (block_of(sums_through_a_part, inner=lambda: nn.Sequential(linear(), Doubtful())), "norm"),
    "clone": (block_of(keeps_a_clone), "uses its input before"),
    "concatenation": (block_of(keeps_a_concatenation), "uses its input before"),
    "mean": (block_of(takes_a_mean), "uses its input before"),
    "in-place": (block_of(scales_in_place), "uses its input before"),
    "last-token": (block_of(norms_the_last_token), "uses its input before"),
    "transposed": (block_of(norms_transposed), "uses its input before"),
    "dropout": (block_of(drops_out), "uses its input before"),
    "cast": (block_of(casts), "no norm reads"),
    "post-norm": (block_of(mixes_without_a_norm), "no norm reads"),
    "one-norm-twice": (block_of(norms_twice), "called at several places"),
    "no-norm": (block_of(Block.forward, norm=Scaled), "none of the known norms"),
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", BLOCKS)
def test_only_a_norm_that_can_carry_the_edit_is_fused(case: str, ids: Tensor) -> None:
    block, expected = BLOCKS[case]
    model = Decoder(block).eval()
    anatomy = examine(model)
    names = {module: name for name, module in model.named_modules()}
    for i in range(2):
        found = anatomy.sites[i]
        assert found.site == (i, "resid_pre")
        if found.fused is not None:
            assert names[found.fused.module] == f"layers.{i}.{expected}"
        else:
            assert expected in found.reason
    plan = sk.Plan(sk.ablate(torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))), layers=[0, 1])
    unit = plan.steps[0].edits[0].rows[None].vectors[0]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        plain = model(input_ids=ids)
        for each in model.layers:
            handle = each.register_forward_pre_hook(lambda _, args: (args[0] - (args[0] * unit).sum(-1, True) * unit,))
            stack.callback(handle.remove)
        expected_output = model(input_ids=ids)
    with torch.no_grad(), sk.steer(model, plan, backend="reference"):
        assert torch.equal(model(input_ids=ids), expected_output)
    assert not torch.allclose(plain, expected_output, atol=1e-2)


def test_the_middle_needs_a_sum_that_the_block_goes_on_with() -> None:
    def sequential(self: Any, h: Tensor) -> Tensor:
        h = h + self.mix(self.norm(h))
        return h + self.mix(self.other(h))

    def scaled(self: Any, h: Tensor) -> Tensor:
        h = 0.5 * h + self.mix(self.norm(h))
        return h + self.mix(self.other(h))

    def in_place(self: Any, h: Tensor) -> Tensor:
        h += self.mix(self.norm(h))
        return h + self.mix(self.other(h))

    def post_norm(self: Any, h: Tensor) -> Tensor:
        h = self.norm(h + self.mix(h))
        return self.other(h + self.mix(h))

    def middle(forward: Callable[[Any, Tensor], Tensor]) -> list[nn.Module]:
        return [f.door for f in examine(Decoder(block_of(forward))).sites if f.site == (1, "resid_mid")]

    for forward in (sequential, scaled, in_place):
        (norm,) = middle(forward)
        assert isinstance(norm, nn.LayerNorm), forward
    assert middle(post_norm) == middle(Block.forward) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "convention", "eps"),
    [
        (lambda: LlamaRMSNorm(WIDTH, eps=1e-6), Norm.LLAMA, 1e-6),
        (lambda: GemmaRMSNorm(WIDTH, eps=3e-5), Norm.GEMMA, 3e-5),
        (lambda: nn.LayerNorm(WIDTH), Norm.LAYER, 1e-5),
        (lambda: nn.LayerNorm(WIDTH, bias=False, eps=1e-12), Norm.LAYER, 1e-12),
        (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), Norm.LAYER, 1e-5),
    ],
)
def test_conventions_are_told_apart_by_arithmetic(
    make: Callable[[], nn.Module], convention: Norm, eps: float, dtype: torch.dtype
) -> None:
    norm = make().to(dtype)  # its weights are still ones or zeros
    before = {name: p.clone() for name, p in norm.named_parameters()}
    spec = recognise(norm, WIDTH, dtype)
    assert spec is not None
    assert (spec.norm, spec.eps, spec.width, spec.dtype) == (convention, eps, WIDTH, dtype)
    assert all(torch.equal(p, before[name]) for name, p in norm.named_parameters())


def test_an_eps_that_no_attribute_names_is_measured() -> None:
    class Hidden(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return F.layer_norm(h.float(), h.shape[-1:], None, None, 2e-6).to(h.dtype)

    for dtype in (torch.float32, torch.bfloat16):
        spec = recognise(Hidden(), WIDTH, dtype)
        assert spec is not None
        assert (spec.norm, spec.eps) == (Norm.LAYER, 2e-6)


class EpsOutside(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True).sqrt() + 1e-6)


class Writing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mul_(torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).softmax(-1)


@pytest.mark.parametrize(
    "make", [Scaled, EpsOutside, Writing, nn.SiLU, nn.Dropout, nn.Identity, lambda: nn.Softmax(-1)]
)
def test_what_is_no_norm_is_not_recognised(make: Callable[[], nn.Module]) -> None:
    assert recognise(make().eval(), WIDTH, torch.float32) is None


def test_weights_of_another_dtype_or_size_are_left_to_the_module() -> None:
    assert recognise(LlamaRMSNorm(WIDTH), WIDTH, torch.bfloat16) is None
    assert recognise(LlamaRMSNorm(WIDTH), 2 * WIDTH, torch.float32) is None


def traces_of(model: nn.Module) -> list[object]:
    """Everything of a model that a probe could touch."""
    traces: list[object] = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not isinstance(v, (dict, Tensor))}
        hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("hooks") and v}
        traces.append((name, type(module), own, hooks, list(module._modules)))
    traces += [(n, p.data_ptr(), p._version, p.grad, p.requires_grad) for n, p in model.named_parameters()]
    traces += [(n, b.data_ptr(), b._version) for n, b in model.named_buffers()]
    return traces


def shape(anatomy: Anatomy) -> list[tuple[object, ...]]:
    return [(f.site, f.fused is None, f.reason) for f in anatomy.sites]


@pytest.mark.parametrize("shortcut", [True, False])
def test_examine_leaves_no_trace(shortcut: bool) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.layers[2].self_attn.register_forward_hook(lambda *_: None)
    before, state = traces_of(model), torch.get_rng_state()
    examine(model, shortcut=shortcut)
    assert traces_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_examine_leaves_no_trace_when_the_model_fails() -> None:
    model = tiny_llama()
    model.model.layers[2].mlp.down_proj.forward = lambda x: 1 / 0
    before = traces_of(model)
    with pytest.raises(sk.PlanError, match=r"LlamaModel does not run on 3 plain tokens: division by zero"):
        examine(model, shortcut=False)
    assert traces_of(model) == before


def test_hooks_of_the_user_do_not_see_the_probe() -> None:
    model, seen = tiny_llama(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    examine(model)
    assert seen == []


def test_a_norm_with_a_pre_hook_is_not_fused_and_the_edit_still_holds(ids: Tensor) -> None:
    model = tiny_llama()
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    check_against_a_hook(model, ids, "forward pre-hooks")


def test_patched_forwards_are_kept_and_not_fused(ids: Tensor) -> None:
    # as accelerate does it: the instance's forward is replaced, nothing else shows
    model, called = tiny_llama(), []
    blocks = model.model.layers
    for module in (blocks[1].input_layernorm, blocks[2], blocks[3].mlp, model.model):

        def patched(*args: Any, _forward: Any = module.forward, _module: nn.Module = module, **kwargs: Any) -> Any:
            called.append(_module)
            return _forward(*args, **kwargs)

        module.forward = patched
    check_against_a_hook(model, ids, "none of the known norms")
    called.clear()
    with torch.no_grad():
        model(ids)
    assert len(called) == 4


def check_against_a_hook(model: nn.Module, ids: Tensor, reason: str | None, decoder: Any = None) -> None:
    """The edit of block 1's input equals a hook, and its site is not fused for ``reason`` (None: it is fused)."""
    decoder = decoder or model.model
    found = examine(model).sites[1]
    assert found.site == (1, "resid_pre")
    assert (found.fused is not None) if reason is None else (reason in found.reason)
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    plan = sk.Plan(sk.add(vector), layers=1)
    with torch.no_grad():
        plain = model(ids)[0].clone()
        handle = decoder.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))
        expected = model(ids)[0].clone()
        handle.remove()
        for backend in ("reference", "cpu"):
            with sk.steer(model, plan, backend=backend):
                found_logits = model(ids)[0]
            # norms sum in another order
            torch.testing.assert_close(found_logits, expected, atol=0.0 if backend == "reference" else 1e-4, rtol=0.0)
        assert torch.equal(model(ids)[0], plain)
    assert not torch.allclose(plain, expected, atol=0.1)


def test_norms_kept_in_fp32_inside_a_half_model(ids: Tensor) -> None:
    model = tiny_llama().bfloat16()
    for block in model.model.layers:
        block.input_layernorm = GptOssRMSNorm(model.config.hidden_size)  # multiplies in fp32, then rounds
    anatomy = examine(model)
    assert [f.fused is None for f in anatomy.sites[:LAYERS]] == [True] * LAYERS
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        handle = model.model.layers[1].register_forward_pre_hook(
            lambda _, args: ((args[0].float() + vector).bfloat16(), *args[1:])
        )
        expected = model(ids).logits
        handle.remove()
        with sk.steer(model, sk.Plan(sk.add(vector), layers=1), backend="reference"):
            assert torch.equal(model(ids).logits, expected)


def test_the_base_model_alone(ids: Tensor) -> None:
    model = tiny_llama().model
    check_against_a_hook(model, ids, None, decoder=model)


def test_wrappers_that_pass_attributes_on(ids: Tensor) -> None:
    class Tuned(nn.Module):  # as PEFT does it
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model(*args, **kwargs)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.a, self.b = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.b(self.a(x))

    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn.q_proj = Adapter(block.self_attn.q_proj)
        block.mlp.down_proj = Adapter(block.mlp.down_proj)
    check_against_a_hook(Tuned(model), ids, None, decoder=model.model)


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiled_models_are_examined_eagerly(what: str) -> None:
    model = tiny_llama()
    expected = shape(examine(model))
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    if what == "model":
        compiled = torch.compile(model, backend=backend)
        with sk.steer(compiled, sk.Plan(sk.add(torch.ones(model.config.hidden_size))), silent="ignore") as session:
            assert shape(session.anatomy) == expected
    else:
        for block in model.model.layers:
            block.compile(backend=backend)
        assert shape(examine(model)) == expected
    assert traced == []


def test_training_and_gradient_checkpointing_do_not_matter() -> None:
    model = tiny_llama()
    expected = shape(examine(model))
    model.gradient_checkpointing_enable()
    model.train()
    assert shape(examine(model)) == expected
    assert model.training


def test_inference_mode(ids: Tensor) -> None:
    with torch.inference_mode():
        model = tiny_llama()
        expected = shape(examine(model))
    assert expected == shape(examine(tiny_llama()))


def test_norms_inside_parts_that_are_not_run_again_are_found() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=32,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    found = {spec.module for spec in examine(model).norms}
    assert found == {module for module in model.modules() if type(module).__name__ == "Qwen3RMSNorm"}


def test_a_part_of_another_size_is_no_stand_in() -> None:
    class Heads(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
            self.norm = nn.LayerNorm(width, elementwise_affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.into(x)))

    model = Decoder()
    for block, width in zip(model.layers, (4, 8), strict=True):
        block.mix = Heads(width)
    widths = {spec.module: spec.width for spec in examine(model).norms}
    assert [widths[block.mix.norm] for block in model.layers] == [4, 8]


def test_attention_runs_once_per_class_of_block() -> None:
    model = Decoder(block_of(Block.forward, mix=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH))), layers=5)
    runs = []
    for block in model.layers:
        block.mix.forward = lambda x, _block=block: runs.append(_block) or x * 1.0
    examine(model)
    assert runs == [model.layers[0]]


# errors, in one sentence


def test_what_is_no_decoder_of_transformers_raises() -> None:
    with pytest.raises(TypeError, match=r"steerkern steers transformers models, got Linear without a config"):
        examine(nn.Linear(2, 2))
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    with pytest.raises(sk.PlanError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        examine(T5ForConditionalGeneration(T5Config(**small)))


def test_a_decoder_without_the_number_of_blocks_in_its_config_raises() -> None:
    model = Decoder()
    model.config.num_hidden_layers = 7
    with pytest.raises(sk.PlanError, match=r"Decoder has no list of 7 decoder blocks"):
        examine(model)


def test_a_decoder_on_several_devices_raises() -> None:
    model = tiny_llama()
    model.model.layers[-1].to("meta")
    with pytest.raises(sk.PlanError, match=r"weights of LlamaModel must lie on one device, found cpu, meta"):
        examine(model)
    with pytest.raises(sk.PlanError, match=r"weights of LlamaModel are not loaded"):
        examine(model.to("meta"))


def test_blocks_that_are_skipped_or_shared_raise() -> None:
    class Skips(Decoder):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            return self.norm(self.layers[0](self.embed(input_ids)))

    with pytest.raises(sk.PlanError, match=r"the blocks of Skips were not called once each, in order"):
        examine(Skips())
    model = Decoder()
    model.layers[1] = model.layers[0]
    with pytest.raises(sk.PlanError, match=r"blocks 0 and 1 of Decoder are one module"):
        examine(model)


def test_a_decoder_that_changes_the_state_between_blocks_raises() -> None:
    class Scales(Decoder):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            h = self.embed(input_ids)
            for block in self.layers:
                h = 2.0 * block(h)
            return self.norm(h)

    with pytest.raises(sk.PlanError, match=r"Scales does not hand on to block 1 what block 0 returns"):
        examine(Scales())


def test_a_state_that_is_read_again_later_has_no_site() -> None:
    class Remembers(Decoder):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            first = self.layers[0](self.embed(input_ids))
            return self.norm(self.layers[1](first) + first)

    model = Remembers()
    assert [f.site for f in examine(model).sites] == [(0, "resid_pre"), (1, "resid_post")]
    with pytest.raises(sk.PlanError, match=r"resid_pre\[1\]: no such site"):
        sk.steer(model, sk.Plan(sk.add(torch.ones(WIDTH))))


def test_a_state_that_is_not_one_row_per_token_raises() -> None:
    class Wide(Decoder):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            h = self.embed(input_ids).transpose(0, 1)
            for block in self.layers:
                h = block(h)
            return self.norm(h)

    with pytest.raises(sk.PlanError, match=r"resid_pre\[0\]: the state has shape \[3, 2, 16\]"):
        examine(Wide())
