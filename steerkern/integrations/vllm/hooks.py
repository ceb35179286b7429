"""Where the plugin stands in vLLM: each hook wraps one method of one class, and hands on what it does not need.

======================================  ===================================================================
``InputProcessor``                      API process: its admission, and a ticket for each request
``AsyncLLM.generate``                   API process: bad requests are refused before a response is begun
``kv_cache_utils``                      scheduler: names of blocks in the prefix cache
``BaseModelLoader.load_model``          worker: find the sites, put the op in, before compilation and capture
``GPUModelRunner`` (V1)                 worker: requests come and go, row map of each forward
``gpu.GPUModelRunner``, ``ModelState``  worker, model runner V2: the same
``WorkerBase.steerkern``                worker: what ``collective_rpc`` reaches
======================================  ===================================================================
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from ...errors import PlanError
from ...plan import Plan
from .admission import Admission
from .anatomy import examine
from .asked import ticket_of
from .prefix_cache import keys_of
from .settings import INSTALLED, NAME, check_engine, settings_of
from .worker import Steering

_log = logging.getLogger(f"vllm.{NAME}")
HELD = f"_{NAME}"
"""Attribute of vLLM's objects that holds the plugin's own."""


def install() -> None:
    """Wrap what every process has, once; the model runners follow in the workers, which have imported theirs."""
    for module, owner, name, around in _HOOKS:
        wrap(module, owner, name, around)
    worker: Any = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    worker.steerkern = _rpc


def wrap(module: str, owner: str, name: str, around: Callable[..., Any]) -> None:
    """Let ``around(stock, *args, **kwargs)`` stand in for a method or function.

    Raises:
        ImportError: a vLLM that does not have it.
    """
    try:
        holder: Any = importlib.import_module(module)
        holder = getattr(holder, owner) if owner else holder
        stock = getattr(holder, name)
    except (ImportError, AttributeError) as error:
        from vllm import __version__

        raise ImportError(f"steerkern knows vLLM 0.32, and this is {__version__}: {error}") from error
    if hasattr(stock, HELD):
        return

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs)

    setattr(call, HELD, stock)
    setattr(holder, name, call)


# the API process


def _init_processor(stock: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    stock(processor, *args, **kwargs)
    admission = processor.__dict__[HELD] = Admission.of(processor.vllm_config)
    for kind, owner in (("completion", "CompletionRequest"), ("chat_completion", "ChatCompletionRequest")):
        module = f"vllm.entrypoints.openai.{kind}.protocol"
        if module in sys.modules:  # in a server they are loaded long before
            wrap(module, owner, "to_beam_search_params", functools.partial(_beam_search, admission))


def _beam_search(admission: Admission, stock: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    admission.refuse_beams(request.vllm_xargs)
    return stock(request, *args, **kwargs)


def _process_inputs(stock: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = stock(processor, *args, **kwargs)
    processor.__dict__[HELD].admit(request)
    return request


def _generate(stock: Any, engine: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
    """Not a generator itself, so that it raises when it is called."""
    admission: Admission = engine.input_processor.__dict__[HELD]
    admission.check(sampling_params.extra_args)
    outputs = stock(engine, prompt, sampling_params, request_id, **kwargs)
    return outputs if admission.library is None else admission.tracked(request_id, outputs)


# the scheduler


def _block_keys(stock: Any, request: Any, start: int, end: int) -> list[Any]:
    return [*stock(request, start, end), *keys_of(request, end)]


# a worker


def _load_model(stock: Any, loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    model = stock(loader, vllm_config, model_config, *args, **kwargs)
    settings = settings_of(vllm_config)
    if settings is None or model_config is not vllm_config.model_config:  # a draft model is not steered
        return model
    check_engine(vllm_config)
    for module, owner, name, around in _RUNNERS:
        if module in sys.modules:
            wrap(module, owner, name, around)
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    weight = next(model.parameters())
    steering = Steering(
        settings,
        examine(model, vllm_config),
        [Plan.from_pretrained(source).named(name) for name, source in settings.plans.items()],
        tokens=scheduler.max_num_batched_tokens,
        requests=scheduler.max_num_seqs,
        device=weight.device,
        dtype=model_config.dtype,
        ranks=parallel.pipeline_parallel_size,
    )
    steering.install()
    from ... import __version__

    sites = [str(site) for site in steering.sites]
    vllm_config.additional_config[NAME] = {
        **vllm_config.additional_config[NAME],
        INSTALLED: {"version": __version__, "sites": sites},
    }
    model.__dict__[HELD] = steering
    _log.info("steerkern: %d plans, backend %s, sites %s", len(steering.plans), steering.backend, ", ".join(sites))
    for site, reason in steering.anatomy.refused.items():
        if site.name != "resid_mid":
            _log.warning("steerkern: %s cannot be steered: %s", site, reason)
    return model


def _steering(runner: Any) -> Steering | None:
    """A model runner's, which keeps it where attribute look-up is cheap."""
    held = runner.__dict__.get(HELD, runner)
    if held is runner:
        held = runner.__dict__[HELD] = runner.get_model().__dict__.get(HELD)
        if held is None and settings_of(runner.vllm_config) is not None:
            raise PlanError("the model was loaded in a way that steerkern does not know, so it cannot be steered")
    steering: Steering | None = held
    return steering


def _arrive(steering: Steering, scheduled: Any) -> None:
    for new in scheduled.scheduled_new_reqs:
        ticket = ticket_of(new.sampling_params)
        if ticket is not None:
            steering.arrive(new.req_id, ticket)


def _update_states(stock: Any, runner: Any, scheduled: Any) -> Any:
    """V1: requests that ended go before those that may have their names come."""
    steering = _steering(runner)
    if steering is not None:
        steering.leave(scheduled.finished_req_ids)
        _arrive(steering, scheduled)
    return stock(runner, scheduled)


def _prepare_inputs(stock: Any, runner: Any, scheduled: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
    """V1: the rows of the coming forward."""
    steering = _steering(runner)
    if steering is not None:
        batch = runner.input_batch
        past = batch.num_computed_tokens_cpu[: batch.num_reqs]
        steering.forward(batch.req_ids, past.tolist(), tokens.tolist())
    return stock(runner, scheduled, tokens, *args, **kwargs)


def _finish_requests(stock: Any, runner: Any, scheduled: Any) -> Any:
    """V2: requests that were put off stay known, with what was decided about them."""
    steering = _steering(runner)
    if steering is not None:
        steering.leave(scheduled.finished_req_ids)
    return stock(runner, scheduled)


def _add_requests(stock: Any, runner: Any, scheduled: Any) -> Any:
    steering = _steering(runner)
    if steering is not None:
        _arrive(steering, scheduled)
    return stock(runner, scheduled)


def _prepare_inputs_v2(stock: Any, runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    """V2: the rows of the coming forward, once its batch is put together."""
    batch = stock(runner, scheduled, *args, **kwargs)
    steering = _steering(runner)
    if steering is not None:
        past, tokens = batch.num_computed_tokens_np, batch.num_scheduled_tokens
        steering.forward(batch.req_ids, past.tolist(), tokens.tolist())
    return batch


def _rpc(worker: Any, verb: str, *args: Any) -> Any:
    """What ``collective_rpc("steerkern", args=(verb, ...))`` does in each worker."""
    from .remote import VERBS

    steering = _steering(worker.model_runner)
    return VERBS[verb](steering, *args)


_HOOKS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    ("vllm.v1.engine.input_processor", "InputProcessor", "__init__", _init_processor),
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", _process_inputs),
    ("vllm.v1.engine.async_llm", "AsyncLLM", "generate", _generate),
    ("vllm.v1.core.kv_cache_utils", "", "_gen_prompt_embeds_extra_hash_keys", _block_keys),
    ("vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_model", _load_model),
)
_RUNNERS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_update_states", _update_states),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs", _prepare_inputs),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "finish_requests", _finish_requests),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "add_requests", _add_requests),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "prepare_inputs", _prepare_inputs_v2),
)
