"""Two gloo ranks of a tensor-parallel model, as transformers shards it, steer like one process.

Attaching runs a probe forward, which holds collectives like any other: every rank has to attach.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.distributed
from packaging import version
from torch import Tensor
from transformers import AutoModelForCausalLM

import steerkern as sk
from steerkern.extraction import means
from tests.extraction.conftest import build_tokenizer
from tests.runtime.models import LAYERS, VOCABULARY, WIDTH, tiny_llama

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ROWS = ["up", None, ("up", "gone"), "gone"]
NATIVE = version.parse(transformers.__version__).major >= 5
"""Whether transformers takes a DistributedConfig; before, it takes ``tp_plan`` itself and needs accelerate."""
TOLERANCE = 1e-4  # logits up to 10, fp32: an all-reduce adds the halves of each row in another order (8e-6 measured)


def prompts() -> tuple[Tensor, Tensor]:
    """Four prompts of 9, 9, 6 and 4 tokens, padded on the left, with their mask."""
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[2, :3] = mask[3, :5] = 0
    return ids * mask, mask


def plans() -> list[sk.Plan]:
    up, gone = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    return [
        sk.Plan(sk.add(up / up.norm(), 12.0), layers=[2], scope="reply", name="up"),
        sk.Plan(sk.ablate(gone), layers="all", name="gone"),
    ]


def steered(model: Any, rows: list[Any] | None) -> dict[str, Any]:
    """Logits of the prompts and a greedy reply; ``rows`` None leaves the model alone."""
    ids, mask = prompts()
    session = None if rows is None else sk.steer(model, plans())
    if session is not None:
        session.rows(rows)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    reply = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    if session is None:
        return {"logits": logits, "reply": reply}
    sites = [(str(found.site), found.fused is not None) for found in session.anatomy.sites]
    receipt = session.receipt().to_json()
    session.detach()
    return {"logits": logits, "reply": reply, "sites": sites, "receipt": receipt}


def work(rank: int, port: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        torch.distributed.init_process_group("gloo")
        model = sharded(folder / "model")
        split = model.model.layers[0].self_attn.q_proj.weight
        kept = {
            "local rows": getattr(split, "to_local", lambda: split)().shape[0],
            "plain": steered(model, None),
            "steered": steered(model, ROWS),
            "one rank": steered(model, ROWS if rank == 0 else [None] * len(ROWS)),
            "after": steered(model, None),
            "means": extracted(model),
        }
        torch.save(kept, folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise


def sharded(path: Path) -> Any:
    """The model of ``path`` with each projection split over the ranks."""
    how: dict[str, Any] = {"tp_plan": "auto"}
    if NATIVE:
        how = {"distributed_config": transformers.distributed.DistributedConfig(**how)}
    return AutoModelForCausalLM.from_pretrained(path, **how).eval()


def model_alone() -> Any:
    return tiny_llama(vocab_size=512)  # as many tokens as the tokenizer has, and more


def extracted(model: Any) -> Tensor:
    found = means(model, build_tokenizer(), ["How do I?", "no"], ["Why?"], batch_size=1, progress=False)
    return found["t_inst"].positive.mean


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    if not NATIVE and importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers 4 needs accelerate for tensor parallelism")
    folder = tmp_path_factory.mktemp("parallel")
    model_alone().save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    hung = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert not any(hung), "a rank waits for another"
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return steered(model_alone(), ROWS)


def test_the_model_is_really_split(ranks: list[dict[str, Any]]) -> None:
    assert [found["local rows"] for found in ranks] == [WIDTH // 2] * 2


def test_two_ranks_steer_like_one_process(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for found in ranks:
        steered_here = found["steered"]
        torch.testing.assert_close(steered_here["logits"], single["logits"], atol=TOLERANCE, rtol=0)
        assert torch.equal(steered_here["reply"], single["reply"])
        assert steered_here["receipt"] == single["receipt"]
    assert torch.equal(ranks[0]["steered"]["logits"], ranks[1]["steered"]["logits"])


def test_every_site_is_fused_as_in_one_process(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for found in ranks:
        assert found["steered"]["sites"] == single["sites"]
    assert len(single["sites"]) == 2 * LAYERS + 1
    assert all(fused for _, fused in single["sites"])


def test_steering_shows_and_every_rank_has_to_do_it(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    """Negative controls: the replies differ from the plain ones, and one rank's session alone is not enough."""
    plain, alone = ranks[0]["plain"], ranks[0]["one rank"]
    for row, names in enumerate(ROWS):
        assert torch.equal(plain["reply"][row], single["reply"][row]) == (names is None)
    assert float((alone["logits"] - single["logits"]).abs().max()) > 100 * TOLERANCE


def test_detached_ranks_are_what_they_were(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert torch.equal(found["after"]["logits"], found["plain"]["logits"])
        assert torch.equal(found["after"]["reply"], found["plain"]["reply"])


def test_extraction_reads_every_prompt_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """Ranks that shared the prompts out would wait for each other in the middle of a layer."""
    expected = extracted(model_alone())
    for found in ranks:
        torch.testing.assert_close(found["means"].float(), expected.float(), atol=1e-5, rtol=1e-5)
