"""SGLang itself on its CPU backend, eager: the tokens of our session, request by request.

Skipped where SGLang is not installed; its packages are for a GPU, so that is a large installation. steerkern has to be
installed too (``pip install .``), as SGLang finds the plugin by its entry point. Run with::

    pytest tests/integrations/test_sglang_engine.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkern as sk
from tests.runtime.models import VOCABULARY, tiny_llama

pytest.importorskip("sglang", reason="SGLang is not installed: pip install sglang")
NEW = 8

SERVE = """
import json, sys

def main():
    import sglang
    options, rounds = json.loads(sys.stdin.read())
    engine = sglang.Engine(**options)
    shared = {"temperature": 0, "max_new_tokens": %d, "ignore_eos": True}
    told = []
    for ids, asked in rounds:
        params = [{**shared, "custom_params": a and {"steerkern": a}} for a in asked]
        try:
            outs = engine.generate(input_ids=ids, sampling_params=params)
            told.append([[out["output_ids"], out["meta_info"]["cached_tokens"]] for out in outs])
        except ValueError as error:
            told.append(str(error))
    print("told", json.dumps(told))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("options", [{}, {"enable_mixed_chunk": True}, {"tp_size": 2}], ids=["", "mixed", "tp2"])
def test_tokens_are_those_of_the_session(tmp_path: Path, options: dict[str, Any]) -> None:
    if not any(point.name == "steerkern" for point in entry_points(group="sglang.srt.plugins")):
        pytest.skip("SGLang finds the plugin by steerkern's entry point: pip install .")
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "model")
    a, b, c = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))
    plans = {
        "push": sk.Plan(sk.add(3 * a), layers=[1, 2]),
        "erase": sk.Plan(sk.ablate(b)),
        "last": sk.Plan(sk.add(40 * c), layers=3, site="resid_post", scope="reply"),
        "first": sk.Plan(sk.add(3 * c), layers=0, scope=sk.Tokens("decode", first=3)),
    }
    for name, plan in plans.items():
        plan.named(name).save_pretrained(tmp_path / name)
    asked: list[Any] = [None, *({"plan": name} for name in plans), {"plan": "push", "scale": 2.0, "scope": "decode"}]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (9 + i,), generator=generator).tolist() for i in range(len(asked))]
    alone = prompts[-1]
    turns: list[Any] = [None, {"plan": "push"}, None, {"plan": "push"}]
    rounds = [(prompts, asked), *(([alone], [one]) for one in turns), ([alone], [{"plan": "none"}])]
    batch, *single, refused = serve(tmp_path, list(plans), rounds, options)
    for ids, wanted, (tokens, _) in zip(prompts, asked, batch, strict=True):
        assert tokens == expected(model, ids, wanted, plans)
    for wanted, ((tokens, cached),), found in zip(turns, single, (0, 0, 12, 12), strict=True):
        assert tokens == expected(model, alone, wanted, plans)
        assert (cached > 0) == (found > 0)  # the plain prefix is not the steered one's
    assert refused == "steerkern.plan must be one of 'push', 'erase', 'last', 'first', got 'none'"


def serve(folder: Path, plans: list[str], rounds: list[Any], options: dict[str, Any]) -> list[Any]:
    """What an engine in a process of its own answers: per round, tokens and number of cached ones per request."""
    settings = {
        "model_path": str(folder / "model"), "device": "cpu", "dtype": "float32", "skip_tokenizer_init": True,
        "attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none",
        "disable_cuda_graph": True, "chunked_prefill_size": 8, "max_total_tokens": 512, "max_running_requests": 8,
        "context_length": 128, "log_level": "error", "enforce_disable_flashinfer_allreduce_fusion": True,
    }  # fmt: skip
    environment = {"STEERKERN_PLANS": os.pathsep.join(str(folder / name) for name in plans)}
    if options.get("tp_size", 1) > 1:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    (folder / "serve.py").write_text(SERVE % NEW)
    run = subprocess.run(
        [sys.executable, str(folder / "serve.py")], input=json.dumps([{**settings, **options}, rounds]), text=True,
        capture_output=True, timeout=280, env={**os.environ, **environment, "SGLANG_USE_CPU_ENGINE": "1"}, check=False,
    )  # fmt: skip
    told = [line.removeprefix("told ") for line in run.stdout.splitlines() if line.startswith("told ")]
    assert told, run.stderr[-4000:]
    answer: list[Any] = json.loads(told[0])
    return answer


def expected(model: Any, ids: list[int], wanted: dict[str, Any] | None, plans: dict[str, sk.Plan]) -> list[int]:
    plan: Any = []
    if wanted is not None:
        plan = plans[wanted["plan"]].scaled(wanted.get("scale", 1.0))
        plan = plan.scoped(wanted["scope"]) if "scope" in wanted else plan
    with sk.steer(model, plan):
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, eos_token_id=None, do_sample=False)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens
