"""Engines of vLLM, each in a process of its own that waits between its runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Requests of one run: prompts, the plan of each, and how many tokens to generate."""

    prompts: Sequence[Sequence[int]]
    plans: Sequence[str | None]
    new: int


class EngineProcess:
    """An engine; called with work, it gives back the tokens of each reply.

    Args:
        model: folder.
        settings: ``additional_config["steerkern"]``; None leaves it out.
        plugin: whether vLLM loads the plugin at all.
    """

    def __init__(self, model: str, settings: Mapping[str, Any] | None, *, plugin: bool = True, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        environment = {**ENVIRONMENT, "VLLM_PLUGINS": "steerkern" if plugin else ""}
        extra = {} if settings is None else {"additional_config": {"steerkern": dict(settings)}}
        arguments = (other, environment, {"model": model, **options, **extra})
        self._process = context.Process(target=serve, args=arguments, daemon=True)

    def __enter__(self) -> EngineProcess:
        self._process.start()
        assert self._pipe.recv() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.send(None)
        self._process.join()

    def __call__(self, work: Work) -> list[list[int]]:
        self._pipe.send(work)
        replies: list[list[int]] = self._pipe.recv()
        return replies


def serve(pipe: Connection, environment: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """The process: an engine that takes work until it gets None."""
    os.environ.update(environment)
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    llm = LLM(**options)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        several = [
            SamplingParams(max_tokens=work.new, temperature=0, ignore_eos=True, extra_args=plan and {"steerkern": plan})
            for plan in work.plans
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in work.prompts]
        made = llm.generate(prompts, several, use_tqdm=False)
        pipe.send([list(one.outputs[0].token_ids) for one in made])
