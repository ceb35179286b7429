"""Two gloo processes read what one reads, fail together, and add up by one all-reduce per set."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from steerkern.extraction import extract, means
from steerkern.extraction.shards import Ranks
from tests.extraction.conftest import build_model, build_tokenizer

PROMPTS = [f"{'tell me the time and ' * (i % 5)}make a cake {i}?" for i in range(13)]
OTHERS = ["bake the cake.", "Write a reply, then a letter.", "is it so?", "really?", "no"]
SETTINGS: dict[str, Any] = {"positions": ("t_inst", "t_post"), "batch_size": 3, "progress": False}
ULPS = 1e-14  # of float64 sums in another order: 13 numbers, 1.1e-16 each


def broken(layer: int) -> Any:
    model = build_model()
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = torch.nan
    return model


def failure(rank: int, case: str) -> str:
    """What a rank raises, by class and text."""
    prompts, model, tokenizer, settings = list(PROMPTS), build_model(), build_tokenizer(), dict(SETTINGS)
    if case == "NaN on one rank":
        model = broken(1) if rank == 1 else model
    elif case == "memory on one rank" and rank == 1:
        model.model.layers[1].register_forward_pre_hook(_exhausted)
    elif case == "bad prompt on one rank" and rank == 0:
        prompts[2] = "time " * 130
    elif case == "other prompts" and rank == 1:
        prompts[2] = "something else"
    elif case == "no prompts":
        prompts = []
    elif case == "batch size":
        settings["batch_size"] = 0
    try:
        means(model, tokenizer, prompts, OTHERS, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _exhausted(*_: object) -> None:
    raise MemoryError("out of memory")


CASES = ["NaN on one rank", "memory on one rank", "bad prompt on one rank", "other prompts", "no prompts", "batch size"]


def work(rank: int, count: int, port: int, results: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
        model, tokenizer = build_model(), build_tokenizer()
        reduced, stock = [], dist.all_reduce
        dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor), stock(tensor, *args, **kwargs))[1]
        forwards = []
        model.model.register_forward_pre_hook(
            lambda _, __, inputs: forwards.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
        found = means(model, tokenizer, PROMPTS, OTHERS, **SETTINGS)
        sums = [(tensor.dtype, tensor.dim()) for tensor in reduced]
        shared = list(forwards)
        forwards.clear()
        alone = means(model, tokenizer, PROMPTS, OTHERS, sharded=False, **SETTINGS)
        forwards_alone = len(forwards)
        directions = extract(model, tokenizer, PROMPTS[:2], OTHERS, batch_size=16, progress=False)  # one batch per set
        kept = {
            "sums": sums,
            "shared": shared,
            "alone": forwards_alone,
            "means": {p: tensors(c) for p, c in found.items()},
            "alone means": {p: tensors(c) for p, c in alone.items()},
            "provenance": found["t_post"].provenance,
            "directions": {layer: directions[layer].raw for layer in directions},
            "failures": {case: failure(rank, case) for case in CASES},
        }
        torch.save(kept, results)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise


def tensors(contrast: Any) -> list[Any]:
    return [contrast.positive.mean, contrast.positive.variance, contrast.negative.mean, contrast.negative.variance]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    files = [Path(folder) / f"{rank}.pt" for rank in range(2)]
    ranks = [context.Process(target=work, args=(rank, 2, port, files[rank])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    hung = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
    assert not any(hung), "a rank waits for another"
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def single() -> dict[Any, Any]:
    return means(build_model(), build_tokenizer(), PROMPTS, OTHERS, **SETTINGS)


def test_two_ranks_find_what_one_process_finds(both: list[dict[str, Any]], single: dict[Any, Any]) -> None:
    for found in both:
        for position, contrast in single.items():
            for ours, expected in zip(found["means"][position], tensors(contrast), strict=True):
                torch.testing.assert_close(ours, expected, rtol=ULPS, atol=ULPS)
        assert found["provenance"] == single["t_post"].provenance
    for position in single:  # and both ranks the same bits
        assert all(map(torch.equal, both[0]["means"][position], both[1]["means"][position]))


def test_a_rank_alone_would_not_have_found_it(single: dict[Any, Any]) -> None:
    share = [PROMPTS[i] for i in Ranks(0, 2).share([len(p) for p in PROMPTS], 3)]
    half = means(build_model(), build_tokenizer(), share, OTHERS, **SETTINGS)
    difference = half["t_inst"].positive.mean - single["t_inst"].positive.mean
    assert float(difference.abs().max()) > 1e6 * ULPS


def test_ranks_share_the_forwards_and_sum_once_per_set_in_float64(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["sums"] == [(torch.float64, 1)] * 2
    shapes = [shape for found in both for shape in found["shared"]]
    assert len(shapes) == 5 + 2  # 13 and 5 prompts in batches of 3
    assert [len(found["shared"]) for found in both] == [3 + 1, 2 + 1]


def test_a_rank_may_read_everything_alone(both: list[dict[str, Any]], single: dict[Any, Any]) -> None:
    for found in both:
        assert found["alone"] == 7
        for position, contrast in single.items():
            assert all(map(torch.equal, found["alone means"][position], tensors(contrast)))


def test_fewer_batches_than_ranks(both: list[dict[str, Any]]) -> None:
    expected = extract(build_model(), build_tokenizer(), PROMPTS[:2], OTHERS, batch_size=16, progress=False)
    for found in both:
        assert list(found["directions"]) == list(expected)
        for layer in expected:
            assert torch.equal(found["directions"][layer], expected[layer].raw)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("NaN on one rank", "ValueError: layer 2: NaN or Inf in the state of positive prompt"),
        ("memory on one rank", "RuntimeError: rank 1: MemoryError: out of memory"),
        ("bad prompt on one rank", "ValueError: prompt 2 has 1"),
        ("other prompts", "ValueError: ranks 0 and 1 were given different prompts"),
        ("no prompts", "ValueError: positive holds no prompts"),
        ("batch size", "ValueError: batch_size must be a number from 1, got 0"),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all(both: list[dict[str, Any]], case: str, said: str) -> None:
    first, second = (found["failures"][case] for found in both)
    assert first.startswith(said)
    assert second == first or (case == "memory on one rank" and second == "MemoryError: out of memory")


def test_errors_name_the_prompt_by_its_number_in_the_whole_set(both: list[dict[str, Any]]) -> None:
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(build_tokenizer()(PROMPTS[i])["input_ids"]))
    number = int(both[0]["failures"]["NaN on one rank"].partition("prompt ")[2].split()[0])
    assert number in order[3:6]  # the second batch is the second rank's first


def test_shares_are_whole_batches_and_leave_nothing_out() -> None:
    lengths = [5, 1, 9, 9, 3, 7, 2]
    shares = [Ranks(rank, 3).share(lengths, 2) for rank in range(3)]
    assert shares == [[2, 3, 1], [5, 0], [4, 6]]
    assert Ranks(3, 4).share(lengths, 4) == []
