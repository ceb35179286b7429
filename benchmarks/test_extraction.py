"""Reading states: what capture costs over the forwards that it needs anyway.

``OMP_NUM_THREADS=1 pytest benchmarks/test_extraction.py --benchmark-json=benchmarks/results/extraction.json``
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import effort
from benchmarks.shapes import random_llama
from steerkern.extraction import Rendered, capture
from steerkern.extraction.capture import pad
from steerkern.timing import Contender, interleave

GOAL = 1.10
BATCH, ROUNDS = 16, 15


@pytest.mark.parametrize("shape", ["9M", "34M"])
def test_capture(benchmark: Any, shape: str) -> None:
    """Goal: at most 1.10 times the plain forwards, states of all layers at two tokens."""
    model = random_llama(shape)
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for i in range(32):
        ids = tuple(torch.randint(3, 8000, (32 + i,), generator=generator).tolist())
        prompts.append(Rendered("", ids, 2, len(ids) - 4))

    def plain() -> None:
        order = sorted(prompts, key=lambda prompt: -len(prompt.ids))
        for start in range(0, len(order), BATCH):
            ids, mask = pad([prompt.ids for prompt in order[start : start + BATCH]])
            with torch.no_grad():
                model.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def captured() -> None:
        for _ in capture(model, prompts, ("t_inst", "t_post"), batch_size=BATCH, progress=False):
            pass

    timings = interleave(
        [Contender("plain", plain), Contender("plain again", plain), Contender("capture", captured)],
        rounds=effort.rounds(ROUNDS),
        warmup=effort.warmup(),
    )
    cost = {name: timings.speedup("plain", name) for name in ("plain again", "capture")}
    benchmark.extra_info |= {
        "cost_over_plain_quartiles": {name: [round(v, 3) for v in found] for name, found in cost.items()},
        "goal": GOAL,
    }
    benchmark.pedantic(captured, rounds=1)
    print(f"\n{shape}: capture {cost['capture'].median:.3f} of the plain forwards, goal {GOAL}")
