"""Requests with plans, what a real engine answers, and what the Hugging Face session does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import steerkern as sk
from tests.serving.models import LAYERS, WIDTH

NEW = 12


@dataclass(frozen=True)
class Ask:
    """A prompt, and what ``extra_args`` say about steering it."""

    prompt: tuple[int, ...]
    plans: Any = None
    new: int = NEW


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    """A random direction."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def mixed_plans(*, mid: bool = True) -> dict[str, sk.Plan]:
    """One of each scope: at an inner layer, at all of them, at the final norm and, with ``mid``, inside a block."""
    v = [vector(i) for i in range(4)]
    site: Literal["resid_pre", "resid_mid"] = "resid_mid" if mid else "resid_pre"
    plans = [
        sk.Plan(sk.add(v[0], 6.0), layers=1, name="early"),
        sk.Plan(sk.ablate(v[1]), scope="decode", name="everywhere"),
        sk.Plan(sk.add(v[2], 8.0), layers=LAYERS - 1, site="resid_post", name="last"),
        sk.Plan(sk.clamp(v[3], 3.0), layers=[2], site=site, scope="prompt", name="prompted"),
    ]
    return {plan.name: plan for plan in plans}


def mixed_asks() -> list[Ask]:
    """Prompts of several lengths, steered each in its own way; the first, second and last share a prompt."""
    same = tuple(range(5, 13))
    return [
        Ask(same, "early"),
        Ask(same),
        Ask((20, 21, 22), "everywhere"),
        Ask((30, 31, 32, 33, 34) * 9, "last"),
        Ask((40, 40, 40), "prompted"),
        Ask((50, 51, 52, 53), ["early", "everywhere"]),
        Ask((60, 61), {"plan": "early", "scale": -1.5, "scope": "decode"}),
        Ask(same, "prompted"),
    ]


def expected(model: Path, plans: Mapping[str, sk.Plan], asks: Sequence[Ask]) -> list[list[int]]:
    """Greedy replies of the Hugging Face session, one request after the other."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    replies = []
    for ask in asks:
        several = [_plan(plans, one) for one in (ask.plans if isinstance(ask.plans, list) else [ask.plans]) if one]
        with sk.steer(loaded, several, silent="ignore") if several else contextlib.nullcontext():
            ids = torch.tensor([ask.prompt])
            made = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ask.new, min_new_tokens=ask.new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        replies.append(made[0, len(ask.prompt) :].tolist())
    return replies


def _plan(plans: Mapping[str, sk.Plan], asked: Any) -> sk.Plan:
    fields = {"plan": asked} if isinstance(asked, str) else asked
    plan = plans[fields["plan"]]
    plan = plan.scoped(fields["scope"]) if "scope" in fields else plan
    return plan.scaled(fields.get("scale", 1.0))


def folders(plans: Mapping[str, sk.Plan]) -> dict[str, str]:
    """The plans, saved."""
    root = Path(tempfile.mkdtemp(prefix="plans-"))
    for name, plan in plans.items():
        plan.save_pretrained(root / name)
    return {name: str(root / name) for name in plans}


@dataclass(frozen=True)
class Answer:
    """What an engine made of a request."""

    tokens: list[int]
    cached: int
    """Prompt tokens that it found in the prefix cache."""


class Engine:
    """An engine of vLLM."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """Greedy replies to several requests, sent together."""
        from vllm import SamplingParams

        params = [
            SamplingParams(max_tokens=ask.new, temperature=0, ignore_eos=True, extra_args={"steerkern": ask.plans})
            for ask in asks
        ]
        prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
        made = self.llm.generate(prompts, params, use_tqdm=False)
        return [Answer(list(one.outputs[0].token_ids), one.num_cached_tokens or 0) for one in made]

    def tokens(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The replies alone."""
        return [answer.tokens for answer in self.answers(asks)]

    def workers(self, verb: str) -> list[Any]:
        """What each worker says."""
        told: list[Any] = self.llm.collective_rpc("steerkern", args=(verb,))
        return told


@contextlib.contextmanager
def engine(model: Path, settings: Mapping[str, Any] | None, **changes: Any) -> Iterator[Engine]:
    """An engine under ``additional_config={"steerkern": settings}``, ended afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
        "max_num_batched_tokens": 256, "block_size": 32, "num_gpu_blocks_override": 64, "skip_tokenizer_init": True,
        "additional_config": {} if settings is None else {"steerkern": dict(settings)}, **changes,
    }  # fmt: skip
    try:
        llm = LLM(model=str(model), **options)
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        cleanup_dist_env_and_memory()
