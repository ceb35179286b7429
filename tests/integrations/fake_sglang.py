"""The parts of SGLang 0.5.23 that steerkern hooks, in their shape: names, signatures and the order of calls.

Attention, the key-value pool and the radix cache are as plain as they can be; the weights are those of a Llama of
transformers, with which the results are compared.
"""

from __future__ import annotations

import enum
import pkgutil
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

Cached = list[tuple[Tensor, Tensor]]
"""Keys and values ``[T, heads, d]`` of one request, per layer."""


class RMSNorm(nn.Module):
    """``norm(x)`` or ``norm(x, residual) -> (normed, sum)``; the sum is normalised before it is rounded."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.variance_epsilon = eps
        self._forward_method: Callable[..., Any] | None = None

    def forward(self, *args: Any, backend: object = None, **kwargs: Any) -> Any:
        self._forward_method = self._forward_method or self.forward_native
        return self._forward_method(*args, **kwargs)

    def forward_native(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Any:
        total = x.float()
        if residual is not None:
            total = total + residual.float()
            total = total if post_residual_addition is None else total + post_residual_addition.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = (normed * self.weight).to(x.dtype)
        return normed if residual is None else (normed, total.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, block: nn.Module, layer: int, heads: tuple[int, int]) -> None:
        super().__init__()
        self.attn, self.layer, self.heads = block.self_attn, layer, heads

    def forward(self, positions: Tensor, x: Tensor, batch: Any) -> Tensor:
        size = self.attn.head_dim
        q = self.attn.q_proj(x).view(-1, self.heads[0], size)
        k = self.attn.k_proj(x).view(-1, self.heads[1], size)
        v = self.attn.v_proj(x).view(-1, self.heads[1], size)
        cos, sin = (part[0] for part in batch.rotary(x, positions[None]))
        q, k = (part[0].transpose(0, 1) for part in apply_rotary_pos_emb(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
        ))  # fmt: skip
        out, first = torch.zeros(x.shape[0], self.heads[0], size), 0
        for cache, tokens in zip(batch.caches, batch.tokens, strict=True):
            rows = slice(first, first + tokens)
            cache[self.layer] = keys, values = tuple(
                torch.cat([old, new[rows]]) for old, new in zip(cache[self.layer], (k, v), strict=True)
            )
            mask = torch.ones(tokens, len(keys), dtype=torch.bool).tril(len(keys) - tokens)
            out[rows] = nn.functional.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
                attn_mask=mask, enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
            first += tokens
        return self.attn.o_proj(out.flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, block: nn.Module, layer: int, config: Any) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.self_attn = Attention(block, layer, (config.num_attention_heads, config.num_key_value_heads))
        self.mlp = block.mlp
        self.input_layernorm = RMSNorm(block.input_layernorm.weight, eps)
        self.post_attention_layernorm = RMSNorm(block.post_attention_layernorm.weight, eps)

    def forward(self, positions: Tensor, x: Tensor, batch: Any, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x, batch), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.embed_tokens, config = model.model.embed_tokens, model.config
        self.layers = nn.ModuleList(DecoderLayer(block, i, config) for i, block in enumerate(model.model.layers))
        self.norm = RMSNorm(model.model.norm.weight, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, batch, residual)
        return self.norm(x, residual)[0]


class ForCausalLM(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.lm_head = Decoder(model), model.lm_head
        self.rotary = model.model.rotary_emb

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        return self.lm_head(self.model(input_ids, positions, batch))


class ForwardMode(enum.IntEnum):
    EXTEND = enum.auto()
    DECODE = enum.auto()
    MIXED = enum.auto()
    IDLE = enum.auto()
    TARGET_VERIFY = enum.auto()

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


@dataclass
class ServerArgs:
    """Those that matter here; SGLang has some hundreds."""

    tp_size: int = 1
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int = 64
    enforce_disable_flashinfer_allreduce_fusion: bool = False
    speculative_algorithm: str | None = None
    enable_dp_attention: bool = False


@dataclass
class ScheduleBatch:
    reqs: list[Any]
    forward_mode: ForwardMode
    prefix_lens: list[int]
    extend_lens: list[int]
    padded: int = 0
    """Rows of a captured graph, of which the last ones belong to nobody."""


class FakeSGLang:
    """Fresh classes in modules of SGLang's names, so that one test's hooks are gone in the next."""

    def __init__(self, monkeypatch: Any) -> None:
        self.registry = _registry()
        self.Req, self.SamplingParams = _request_classes()
        self.ForwardBatch, self.ModelRunner = _runner_classes()
        places = {
            "plugins.hook_registry": {"HookRegistry": self.registry, "HookType": HookType},
            "sampling.sampling_params": {"SamplingParams": self.SamplingParams},
            "managers.schedule_batch": {"Req": self.Req},
            "model_executor.forward_batch_info": {"ForwardBatch": self.ForwardBatch},
            "model_executor.model_runner": {"ModelRunner": self.ModelRunner},
        }
        for path, names in places.items():
            parts = ["sglang", "srt", *path.split(".")]
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in sys.modules or not hasattr(sys.modules[name], "fake"):
                    module = types.ModuleType(name)
                    module.__path__, module.fake = [], True  # type: ignore[attr-defined]
                    monkeypatch.setitem(sys.modules, name, module)
                    if depth > 1:
                        setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
            vars(sys.modules[".".join(parts)]).update(names)


def _registry() -> Any:
    class HookRegistry:
        hooks: ClassVar[dict[str, list[tuple[Callable[..., Any], HookType]]]] = defaultdict(list)

        @classmethod
        def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER) -> None:
            cls.hooks[target].append((hook, hook_type))

        @classmethod
        def apply_hooks(cls) -> None:
            for target, hooks in cls.hooks.items():
                path, _, name = target.rpartition(".")
                owner = pkgutil.resolve_name(path)
                bound = isinstance(owner.__dict__[name], classmethod)
                function = owner.__dict__[name].__func__ if bound else owner.__dict__[name]
                for hook, kind in hooks:
                    function = _wrapped(function, hook, kind)
                setattr(owner, name, classmethod(function) if bound else function)

    return HookRegistry


def _wrapped(function: Callable[..., Any], hook: Callable[..., Any], kind: HookType) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kind == HookType.AROUND:
            return hook(function, *args, **kwargs)
        if kind == HookType.BEFORE:
            args, kwargs = hook(*args, **kwargs) or (args, kwargs)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return call


def _request_classes() -> tuple[Any, Any]:
    @dataclass
    class SamplingParams:
        custom_params: dict[str, Any] | None = None

        def verify(self, vocab_size: int) -> None:
            if vocab_size < 1:
                raise ValueError("no vocabulary")

    class Req:
        def __init__(
            self,
            rid: str,
            origin_input_text: str,
            origin_input_ids: list[int],
            sampling_params: Any,
            extra_key: str | None = None,
        ) -> None:
            self.rid, self.origin_input_ids, self.sampling_params = rid, list(origin_input_ids), sampling_params
            self.extra_key = extra_key
            self.output_ids: list[int] = []
            self.logits: list[Tensor] = []
            self.cache: Cached = []
            self.to_finish: str | None = None
            self.done = False

        def finished(self) -> bool:
            return self.done

        def set_finish_with_abort(self, error_msg: str) -> None:
            self.origin_input_ids, self.to_finish = [0], error_msg

    return Req, SamplingParams


def _runner_classes() -> tuple[Any, Any]:
    @dataclass
    class ForwardBatch:
        forward_mode: ForwardMode
        input_ids: Tensor
        positions: Tensor
        rids: list[str] | None = None
        seq_lens_cpu: Tensor | None = None
        extend_prefix_lens_cpu: list[int] | None = None
        extend_seq_lens_cpu: list[int] | None = None
        caches: list[Cached] = field(default_factory=list)
        tokens: list[int] = field(default_factory=list)
        rotary: Any = None

        @classmethod
        def init_new(cls, batch: ScheduleBatch, model_runner: Any, *, return_hidden_states_before_norm: bool) -> Any:
            decode = batch.forward_mode == ForwardMode.DECODE
            ids, positions = [], []
            for req, past, new in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
                ids += [*req.origin_input_ids, *req.output_ids][past : past + new]
                positions += range(past, past + new)
            padding = [0] * max(0, batch.padded - len(ids))
            return cls(
                batch.forward_mode,
                torch.tensor(ids + padding),
                torch.tensor(positions + padding),
                [req.rid for req in batch.reqs],
                torch.tensor([p + n for p, n in zip(batch.prefix_lens, batch.extend_lens, strict=True)]),
                None if decode else list(batch.prefix_lens),
                None if decode else list(batch.extend_lens),
                [req.cache for req in batch.reqs],
                list(batch.extend_lens),
            )

    class ModelRunner:
        def __init__(self, model: nn.Module, server_args: ServerArgs, context_len: int = 64) -> None:
            self.model, self.server_args, self.max_running_requests = model, server_args, 8
            self.model_config = types.SimpleNamespace(context_len=context_len)
            self.captured = False

        def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
            self.captured = True

        def forward(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> Any:
            forward_batch.rotary = self.model.rotary
            logits = self.model(forward_batch.input_ids, forward_batch.positions, forward_batch)
            return types.SimpleNamespace(logits_output=logits, can_run_graph=False)

    return ForwardBatch, ModelRunner


class Engine:
    """A scheduler of a few lines: extends in chunks, mixes them with decodes, shares prefixes by ``extra_key``."""

    def __init__(self, fake: FakeSGLang, model: LlamaForCausalLM, arguments: ServerArgs | None = None) -> None:
        self.fake, self.config = fake, model.config
        with torch.inference_mode():
            self.runner = fake.ModelRunner(ForCausalLM(model), arguments or ServerArgs())
            self.runner.init_cuda_graphs()
        self.radix: list[tuple[str | None, list[int], Cached]] = []
        self.reused = 0
        """Tokens that the last request found in the radix cache."""

    def request(self, ids: list[int], wanted: object = None, **options: Any) -> Any:
        params = self.fake.SamplingParams(None if wanted is None else {"steerkern": wanted})
        params.verify(self.config.vocab_size)
        req = self.fake.Req(f"r{id(params)}", "", ids, params, **options)
        req.cache, self.reused = self._match(req)
        return req

    def extend(self, reqs: list[Any], counts: list[int], **options: Any) -> Any:
        """Each request's next tokens in one forward, MIXED where some of them decode already."""
        mixed = any(req.output_ids for req in reqs)
        return self._run(reqs, counts, ForwardMode.MIXED if mixed else ForwardMode.EXTEND, **options)

    def decode(self, reqs: list[Any], **options: Any) -> Any:
        return self._run(reqs, [1] * len(reqs), ForwardMode.DECODE, **options)

    def generate(self, reqs: list[Any], new: int, chunk: int = 1 << 30) -> list[list[int]]:
        while waiting := [req for req in reqs if self._past(req) < len(req.origin_input_ids)]:
            self.extend(waiting, [min(chunk, len(r.origin_input_ids) - self._past(r)) for r in waiting])
        for _ in range(new - 1):
            self.decode(reqs)
        for req in reqs:
            self.finish(req)
        return [req.output_ids for req in reqs]

    def finish(self, req: Any) -> None:
        req.done = True
        ids = [*req.origin_input_ids, *req.output_ids][: self._past(req)]
        self.radix.append((req.extra_key, ids, list(req.cache)))

    def _run(self, reqs: list[Any], counts: list[int], mode: ForwardMode, padded: int = 0) -> Any:
        batch = ScheduleBatch(reqs, mode, [self._past(req) for req in reqs], counts, padded)
        with torch.inference_mode():
            fed = self.fake.ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
            output = self.runner.forward(fed, pp_proxy_tensors=None)
        first = 0
        for req, count in zip(reqs, counts, strict=True):
            first += count
            if self._past(req) >= len(req.origin_input_ids) + len(req.output_ids):
                req.logits.append(output.logits_output[first - 1].clone())
                req.output_ids.append(int(req.logits[-1].argmax()))
        return output.logits_output

    def _past(self, req: Any) -> int:
        return len(req.cache[0][0])

    def _match(self, req: Any) -> tuple[Cached, int]:
        best, cached = 0, None
        for key, ids, cache in self.radix:
            same = 0
            while same < min(len(ids), len(req.origin_input_ids) - 1) and ids[same] == req.origin_input_ids[same]:
                same += 1
            if key == req.extra_key and same > best:
                best, cached = same, cache
        if cached is None:
            shape = (0, self.config.num_key_value_heads, self.config.head_dim)
            return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.config.num_hidden_layers)], 0
        return [(keys[:best], values[:best]) for keys, values in cached], best
