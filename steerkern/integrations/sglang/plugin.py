"""The hooks into SGLang: where requests arrive, where batches are made, where the model runs.

Every function here has the signature that SGLang's hook registry wants: AFTER hooks get the result and then the
arguments, BEFORE hooks the arguments, AROUND hooks the function and its arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from ...errors import PlanError
from .plans import Plans
from .steering import Asked, Request, Steering

TARGETS = {
    "sglang.srt.sampling.sampling_params.SamplingParams.verify": ("AFTER", "verify"),
    "sglang.srt.managers.schedule_batch.Req.__init__": ("AFTER", "arrive"),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": ("AFTER", "gather"),
    "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs": ("BEFORE", "install"),
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": ("AROUND", "forward"),
}
"""What is hooked: how, and with which method of :class:`Plugin`."""

PLAIN = {
    "speculative_algorithm": None, "dllm_algorithm": None, "disaggregation_mode": "null", "attn_cp_size": 1,
    "dcp_size": 1, "enable_dp_attention": False, "enable_two_batch_overlap": False,
    "enable_single_batch_overlap": False, "enable_pdmux": False, "enable_layernorm_sp": False,
    "enable_attn_tp_input_scattered": False, "enable_aiter_allreduce_fusion": False,
    "enable_nvidia_megakernel": False, "enable_amd_monokernel": False,
}  # fmt: skip
"""Server arguments that split or move the rows of a forward, or fuse the norms away: only these values are steered."""


class Plugin:
    """The hooks of one process, which steer by ``plans``."""

    def __init__(self, plans: Plans) -> None:
        self.plans = plans
        self.asked = Asked()

    def hook(self) -> None:
        """Register every hook; SGLang applies them when all plugins are loaded.

        Raises:
            PlanError: this SGLang lacks what is to be hooked.
        """
        registry = importlib.import_module("sglang.srt.plugins.hook_registry")
        for target in TARGETS:  # SGLang only logs a hook that finds nothing
            try:
                pkgutil.resolve_name(target)
            except (AttributeError, ImportError) as error:
                raise PlanError(f"this SGLang has no {target} ({error}); steerkern knows that of 0.5.23") from None
        for target, (kind, method) in TARGETS.items():
            registry.HookRegistry.register(target, getattr(self, method), registry.HookType[kind])

    def verify(self, result: object, params: Any, *args: object, **kwargs: object) -> None:
        """Refuse a bad field where the request arrives: the ValueError is answered with status 400."""
        self.plans.variant(params.custom_params)

    def arrive(self, result: object, req: Any, *args: object, **kwargs: object) -> None:
        """Note what a request asks for, and keep its part of the radix cache apart from other requests'."""
        req.steerkern = None
        try:
            variant = self.plans.variant(req.sampling_params.custom_params)
            if variant is None:
                return
            length = len(req.origin_input_ids)
            variant.check_prompt(length)
            self.asked.take(variant, req)
        except ValueError as error:
            req.set_finish_with_abort(str(error))
            return
        req.steerkern = Request(variant, length, f"request {req.rid!r}")
        req.extra_key = "|".join(filter(None, (req.extra_key, variant.salt(length))))

    def gather(self, result: Any, cls: object, batch: Any, *args: object, **kwargs: object) -> None:
        """Give the batch that goes to the model what its requests ask for, in their order."""
        result.steerkern = [req.steerkern for req in batch.reqs]

    def install(self, runner: Any, *args: object, **kwargs: object) -> None:
        """Put the op into the norms, after the weights are loaded and before graphs are captured.

        Raises:
            PlanError: naming the server argument that does not go with steering, or what of the model.
        """
        arguments = runner.server_args
        check_arguments(arguments)
        most = max(arguments.chunked_prefill_size or 0, arguments.max_prefill_tokens) + runner.model_config.context_len
        with torch.inference_mode(False):  # tables of that mode could not be written outside it
            runner.steerkern = Steering(runner.model, self.plans, most + runner.max_running_requests)

    def forward(self, stock: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Set the row map, run, and see that every norm in question was called."""
        steering: Steering | None = getattr(runner, "steerkern", None)
        held = parts(forward_batch)
        if steering is None:  # before init_cuda_graphs, which the scheduler calls before it takes requests
            if any(request is not None for request, _, _ in held):
                raise PlanError("a request wants to be steered, and SGLang did not let steerkern attach to the model")
            return stock(runner, forward_batch, *args, **kwargs)
        steering.fill(held)
        try:
            output = stock(runner, forward_batch, *args, **kwargs)
        finally:
            steering.rows.finish()
        if not forward_batch.forward_mode.is_idle():
            steering.review(replayed=output.can_run_graph)
        return output


def check_arguments(arguments: Any) -> None:
    """Raise PlanError for a server argument that does not go with steering."""
    for name, plain in PLAIN.items():
        value = getattr(arguments, name, plain)
        if value != plain:
            raise PlanError(f"server argument {name} is {value!r}; with steering it must be {plain!r}")
    if arguments.tp_size > 1 and not arguments.enforce_disable_flashinfer_allreduce_fusion:
        raise PlanError(
            "with tensor parallelism pass --enforce-disable-flashinfer-allreduce-fusion: its kernel goes past the norms"
        )


def parts(forward_batch: Any) -> list[tuple[Request | None, int, int]]:
    """What a forward holds of each request: the request, its tokens in the cache, and those that are new.

    Raises:
        PlanError: a kind of forward whose rows are not known.
    """
    mode = forward_batch.forward_mode
    if mode.is_idle() or not forward_batch.rids:  # idle ranks, and batches made up for warming up
        return []
    requests = getattr(forward_batch, "steerkern", None)
    if requests is None or len(requests) != len(forward_batch.rids):
        raise PlanError("a forward of requests that were not announced: SGLang rebuilt the batch")
    if mode.is_decode() and forward_batch.seq_lens_cpu is not None:
        lengths = forward_batch.seq_lens_cpu.tolist()
        return [(request, length - 1, 1) for request, length in zip(requests, lengths, strict=True)]
    past, tokens = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    if mode.name not in ("EXTEND", "MIXED") or past is None or tokens is None:
        raise PlanError(f"a forward of kind {mode.name}: steerkern knows EXTEND, MIXED and DECODE with host lengths")
    return list(zip(requests, past, tokens, strict=True))
