"""What a controller adds to decoding: it reads states in the prompt and weighs a plan, all on the device.

``OMP_NUM_THREADS=1 pytest benchmarks/test_controller.py --benchmark-json=benchmarks/results/controller.json``
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkern as sk
from benchmarks import effort
from benchmarks.shapes import SHAPES, random_llama
from steerkern.controller import Controller
from steerkern.timing import Contender, interleave

GOAL = 0.98


@pytest.mark.parametrize("shape", ["34M", "0.5B"])
def test_controller(benchmark: Any, shape: str) -> None:
    """Goal: a plan that a controller weighs costs at most 2 % of decoding over the same plan without one."""
    model = random_llama(shape)
    width, layers = SHAPES[shape]["hidden_size"], SHAPES[shape]["num_hidden_layers"]
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(width, generator=generator)
    reads = [sk.Read(layer, "resid_post") for layer in range(2 * layers // 3, layers)]
    controller = Controller(reads, range(layers), width, hidden=1024)
    guided = controller.plan(dict.fromkeys(range(layers), vector), 0.1, name="guided")
    plain = sk.Plan(sk.add(vector, 0.1), site="resid_post", scope="decode", name="plain")
    ids = torch.randint(3, 8000, (1, 16), generator=generator)
    tokens, full = (6, 10) if shape == "0.5B" else (16, 20)

    def run() -> Any:
        return model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    contenders = [
        Contender("stock", run),
        Contender("plain", run, lambda: sk.steer(model, plain)),
        Contender("plain again", run, lambda: sk.steer(model, plain)),
        Contender("guided", run, lambda: sk.steer(model, guided)),
    ]
    timings = interleave(contenders, rounds=effort.rounds(full), warmup=effort.warmup())
    over = {name: timings.speedup(name, "plain") for name in ("plain again", "guided")}
    benchmark.extra_info |= {
        "speedup_over_plain_quartiles": {name: [round(v, 3) for v in found] for name, found in over.items()},
        "speedup_over_stock": round(timings.speedup("guided", "stock").median, 3),
        "goal": GOAL,
    }
    with sk.steer(model, guided):
        benchmark.pedantic(run, rounds=1)
    print(f"\n{shape}: guided over plain {over['guided'].median:.3f}, plain again {over['plain again'].median:.3f}")
