"""vLLM on the CPU: the steered engine against the one without the plugin, turn by turn.

``pytest benchmarks/test_vllm.py --benchmark-json=benchmarks/results/vllm.json`` in the environment that
``tests/serving/run.sh`` makes. Engines run eager, in fp32, with one thread, without the prefix cache, each in a process
of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkern as sk
from benchmarks import effort
from benchmarks.engines import EngineProcess, Work
from benchmarks.shapes import SHAPES, random_llama
from steerkern.timing import Contender, Quartiles, interleave

pytest.importorskip("vllm")

REQUESTS, PROMPT, NEW, ROUNDS = 64, 8, 12, 24
GOALS = {"half steered": 0.98, "idle": 0.99, "64 plans over one": 0.98}
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": REQUESTS,
    "max_num_batched_tokens": 1024, "block_size": 32, "num_gpu_blocks_override": 256, "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("shape", ["34M"])
def test_generate(benchmark: Any, shape: str, tmp_path: Path) -> None:
    """Goals: half of the requests steered at least 0.98 and an idle plugin at least 0.99 times as fast as no plugin;
    64 plans at least 0.98 times as fast as one."""
    random_llama(shape).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, SHAPES[shape]["vocab_size"], (REQUESTS, PROMPT), generator=generator).tolist()
    plans = {f"p{i}": str(tmp_path / f"p{i}") for i in range(REQUESTS)}
    for unit, (name, folder) in zip(
        torch.randn(REQUESTS, SHAPES[shape]["hidden_size"], generator=generator), plans.items(), strict=True
    ):
        sk.Plan(sk.ablate(unit), name=name).save_pretrained(folder)
    ways: dict[str, list[str | None]] = {
        "none steered": [None] * REQUESTS,
        "half steered": ["p0", None] * (REQUESTS // 2),
        "one plan": ["p0"] * REQUESTS,
        "64 plans": list(plans),
    }
    plain = Work(prompts, ways["none steered"], NEW)
    start = partial(EngineProcess, str(tmp_path / "model"), **OPTIONS)
    with contextlib.ExitStack() as running:
        engines = {
            "stock": running.enter_context(start(None, plugin=False)),
            "stock again": running.enter_context(start(None, plugin=False)),
            "no settings": running.enter_context(start(None)),
            "idle": running.enter_context(start({"sites": "all"})),
        }
        steered = running.enter_context(start({"plans": plans, "sites": "all"}))
        runs: dict[str, Callable[[], Any]] = {name: partial(engine, plain) for name, engine in engines.items()}
        runs |= {name: partial(steered, Work(prompts, chosen, NEW)) for name, chosen in ways.items()}
        check(engines, steered, plain, ways)
        timings = interleave([Contender(name, run) for name, run in runs.items()], rounds=effort.rounds(ROUNDS))
        benchmark.pedantic(runs["half steered"], rounds=1)
    ratios = {name: timings.speedup(name, "stock") for name in runs if name != "stock"}
    ratios["64 plans over one"] = timings.speedup("64 plans", "one plan")
    benchmark.extra_info |= {
        "tokens_per_second": {name: timings.rate(name, REQUESTS * NEW).median for name in runs},
        "speedup_over_stock_quartiles": {name: [round(x, 3) for x in found] for name, found in ratios.items()},
        "goals": GOALS,
        "load_average": os.getloadavg()[1],
    }
    print(f"\n{shape}: " + ", ".join(f"{name} {_text(found)}" for name, found in ratios.items()))


def check(
    engines: dict[str, EngineProcess], steered: EngineProcess, plain: Work, ways: dict[str, list[str | None]]
) -> None:
    """Before anything is timed: plain requests keep their replies, steered ones get those that they get alone."""
    stock = engines["stock"](plain)
    replies = {name: steered(Work(plain.prompts, chosen, NEW)) for name, chosen in ways.items()}
    assert engines["idle"](plain) == replies["none steered"]
    same = sum(one == other for one, other in zip(stock, replies["none steered"], strict=True))
    assert same >= REQUESTS - 2, "more than a near tie, which another order of a norm's sum may break"
    assert replies["half steered"][1::2] == replies["none steered"][1::2]
    assert replies["half steered"][0::2] == replies["one plan"][0::2]
    assert sum(one != other for one, other in zip(replies["64 plans"], stock, strict=True)) >= REQUESTS // 2
    for i in (1, REQUESTS - 1):
        assert steered(Work([plain.prompts[i]], [f"p{i}"], NEW)) == [replies["64 plans"][i]]


def _text(found: Quartiles) -> str:
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"
