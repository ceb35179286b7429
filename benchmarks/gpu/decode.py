"""Decode steps of random-weight models: stock, hooks, our norms without an edit, steered; eager, graph, compiled."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import steerkern as sk
from benchmarks.shapes import SHAPES
from steerkern.ops import dispatch
from steerkern.timing import ablation_hooks, generate_exactly

from .device import Device, Run, interleaved, quartiles, ratio

MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 128},
    "0.5B": SHAPES["0.5B"],
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
PROMPT = 32
EFFECT, REPLAY = 0.7, 0.1
"""Parts of the effect that logits may be away: random weights in bf16 round differently in each layer, a wrong edit is
at 1 or above; a replay only repeats."""
COUNTERS = ("cudagraph_skips", "cudagraph_partitions", "possibly_missed_reinplacing_opportunities")


def model_of(name: str, device: Device) -> LlamaForCausalLM:
    """Seeded random weights in bf16, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None, **MODELS[name])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device.name):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def unit_of(model: LlamaForCausalLM) -> Tensor:
    v = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(v, dim=0)


@contextlib.contextmanager
def session(model: LlamaForCausalLM, plan: sk.Plan, backend: str, rows: int | None) -> Iterator[sk.Session]:
    """Steering by one backend; with ``rows``, our norms stand in the model and no row is steered."""
    with sk.steer(model, plan, backend=backend, silent="ignore") as attached:
        if rows is not None:
            attached.rows([None] * rows)
        yield attached


def settings(
    device: Device, model: LlamaForCausalLM, rows: int
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Every way of running the model, by name."""
    unit = unit_of(model)
    plan = sk.Plan(sk.ablate(unit), name="gate")
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "stock": contextlib.nullcontext,
        "stock again": contextlib.nullcontext,
        "hooks": lambda: ablation_hooks(model, unit),
    }
    for backend in device.backends:
        if not dispatch.backends()[backend]:
            ways[f"{backend}, unsteered"] = lambda backend=backend: session(model, plan, backend, rows)
            ways[f"{backend}, steered"] = lambda backend=backend: session(model, plan, backend, None)
    return ways


def prompts(model: LlamaForCausalLM, device: Device, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (rows, PROMPT), generator=generator).to(device.name)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def correct(device: Device, model: LlamaForCausalLM) -> dict[str, Any]:
    """The logits of a prompt in every way of running the model, judged."""
    inputs = prompts(model, device, 2)
    logits: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for name, setting in settings(device, model, 2).items():
        try:
            with setting(), torch.no_grad():
                logits[name] = model(**inputs).logits.float()
        except Exception as error:
            failed[name] = reason(error)
    return {**judged(logits["stock"], logits["hooks"], logits), "failed": failed}


def judged(stock: Tensor, hooks: Tensor, logits: dict[str, Tensor]) -> dict[str, Any]:
    """How far each way is from the hook, if it steers, else from stock; 1 is the distance between these two."""
    effect, found = (hooks - stock).norm(), {}
    for name, own in logits.items():
        wanted = hooks if name == "hooks" or name.endswith(" steered") else stock
        found[name] = round(float((own - wanted).norm() / effect), 4)
    wrong = {name: f"logits {far} of the effect away" for name, far in found.items() if not far < EFFECT}
    return {"logits": found, "wrong": wrong}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def summary(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_second": {name: round(tokens / quartiles(v)[1], 3) for name, v in seconds.items()},
        "over_stock": {name: ratio(seconds["stock"], v) for name, v in seconds.items()},
    }


def eager(device: Device, model: LlamaForCausalLM, rows: int, without: Mapping[str, str]) -> dict[str, Any]:
    """Greedy ``generate``, prompt included, in every way but those which something speaks against."""
    inputs, tokens, rounds = prompts(model, device, rows), 4 if device.dry else 32, 2 if device.dry else 5
    ways = {name: way for name, way in settings(device, model, rows).items() if name not in without}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    host = Device()
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            with ways[name]():
                device.synchronize()

                def run() -> None:
                    generate_exactly(model, inputs, tokens)
                    device.synchronize()

                taken = host.timed(run)
            if number >= 0:
                seconds[name].append(taken)
    return {**summary(seconds, rows * tokens), "failed": dict(without)}


class Steps:
    """Decode steps of one model over a static cache, the prompt and one token already in it."""

    def __init__(self, device: Device, model: LlamaForCausalLM, rows: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=256)
        self.token = torch.full((rows, 1), 5, device=device.name)
        self.position = torch.full((1,), PROMPT, device=device.name)
        inputs = prompts(model, device, rows)
        self.named = "cache_position" in inspect.signature(type(model.model).forward).parameters
        with torch.no_grad():
            model(input_ids=inputs["input_ids"], past_key_values=self.cache, use_cache=True)
        self.step()

    @torch.no_grad()
    def step(self, forward: Callable[..., Any] | None = None) -> None:
        """One token; addresses stay the same from step to step."""
        options: dict[str, Any] = {"position_ids": self.position.expand(self.token.shape[0], 1)}
        if self.named:
            options["cache_position"] = self.position
        out = (forward or self.model)(input_ids=self.token, past_key_values=self.cache, use_cache=True, **options)
        self.position += 1
        self.logits: Tensor = out.logits


def references(device: Device, model: LlamaForCausalLM, rows: int, steps: int) -> tuple[Tensor, Tensor]:
    """Logits of the stock model and of the hook after so many eager steps more."""
    found = []
    for name in ("stock", "hooks"):
        with settings(device, model, rows)[name]():
            eagerly = Steps(device, model, rows)
            for _ in range(steps):
                eagerly.step()
            found.append(eagerly.logits.float().clone())
    return found[0], found[1]


def captured(device: Device, model: LlamaForCausalLM, rows: int) -> dict[str, Any]:
    """One decode step as a CUDA graph, replayed; what cannot be captured says why, what is wrong is not timed."""
    graphs: dict[str, Run] = {}
    logits: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    kept: list[Any] = []  # sessions own the tables that the graphs read

    def replay(name: str, steps: Steps) -> None:
        graphs[name]()
        device.synchronize()
        logits[name] = steps.logits.float().clone()

    for name, setting in settings(device, model, rows).items():
        try:
            with setting() as attached:
                steps = Steps(device, model, rows)
                graphs[name] = device.graph(steps.step)
                kept += [attached, steps]
                if device.dry:
                    replay(name, steps)  # detached, it would be the stock model's step
            if not device.dry:
                replay(name, steps)
        except Exception as error:
            graphs.pop(name, None)
            failed[name] = reason(error)
            device.synchronize()
    # one step before the capture, one replay
    found = {**judged(*references(device, model, rows, 2), logits), "failed": failed}
    graphs = {name: graph for name, graph in graphs.items() if name not in found["wrong"]}
    if "stock" not in graphs:
        return found
    # far fewer replays than the cache is long
    seconds = interleaved(device, graphs, 3 if device.dry else 20)
    return {**summary(seconds, rows), **found}


def replayed(device: Device, model: LlamaForCausalLM) -> dict[str, Any]:
    """One captured decode step, replayed after the strength changed: distance to an eager step at that strength.

    The distance is in parts of that between the strengths, so a graph that keeps its old tables is at about 1.
    """
    found: dict[str, dict[float, float]] = {}
    wrong: dict[str, str] = {}
    plan = sk.Plan(sk.add(unit_of(model), 8.0), name="gate")
    for backend in device.backends:
        if dispatch.backends()[backend]:
            continue
        try:
            found[backend] = follow(device, model, plan, backend)
        except Exception as error:
            wrong[backend] = reason(error)
            continue
        if not all(far < REPLAY for far in found[backend].values()):
            wrong[backend] = f"a replay does not follow the strength: {found[backend]}"
    return {"distance": found, "wrong": wrong}


def follow(device: Device, model: LlamaForCausalLM, plan: sk.Plan, backend: str) -> dict[float, float]:
    """By strength: how far a replay is from an eager step."""
    logits = {}
    with sk.steer(model, plan, backend=backend) as attached:
        steps = Steps(device, model, 2)
        start = steps.position.clone()
        replay = device.graph(steps.step)
        written = steps.logits  # by every replay
        for scale in (1.0, -1.0, 0.5):
            attached.set(plan.name, scale=scale)
            steps.position.copy_(start)
            replay()
            logits[scale, "graph"] = (steps.logits if device.dry else written).float().clone()
            steps.position.copy_(start)
            steps.step()
            logits[scale, "eager"] = steps.logits.float().clone()
    apart = (logits[1.0, "eager"] - logits[-1.0, "eager"]).norm()
    return {
        scale: round(float((logits[scale, "graph"] - logits[scale, "eager"]).norm() / apart), 5)
        for scale in (1.0, -1.0, 0.5)
    }


def compiled(device: Device, model: LlamaForCausalLM, rows: int, left: Callable[[], float]) -> dict[str, Any]:
    """Decode steps under torch.compile with a static cache, one way after the other, each against stock before it.

    A graph break fails the way, wrong logits leave it without a time; ``counted`` says how often inductor gave up a
    CUDA graph, or copied what an op writes.
    """
    warmup, count = (2, 2) if device.dry else (5, 40)
    stock, hooks = references(device, model, rows, warmup)
    wrong: dict[str, str] = {}
    distance: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    counted: dict[str, dict[str, int]] = {}
    options: dict[str, Any] = {"backend": "aot_eager"} if device.dry else {"mode": "reduce-overhead"}
    for name, setting in settings(device, model, rows).items():
        if left() < 45:
            failed[name] = "no time left"
            continue
        try:
            torch._dynamo.reset()
            counters.clear()
            with setting():
                steps = Steps(device, model, rows)
                forward = torch.compile(model.forward, fullgraph=name != "hooks", **options)
                for _ in range(warmup):
                    steps.step(forward)
                device.synchronize()
                verdict = judged(stock, hooks, {name: steps.logits.float().clone()})
                distance |= verdict["logits"]
                if verdict["wrong"]:
                    wrong |= verdict["wrong"]
                    continue
                seconds[name] = [device.timed(lambda steps=steps, f=forward: steps.step(f)) for _ in range(count)]
                counted[name] = {counter: counters["inductor"][counter] for counter in COUNTERS}
        except Exception as error:
            failed[name] = reason(error)
    torch._dynamo.reset()
    found = {"logits": distance, "wrong": wrong, "counted": counted, "failed": failed}
    return {**summary(seconds, rows), **found} if "stock" in seconds else found
