"""What other libraries add to a decode step, and whether they steer what they were asked to.

``OMP_NUM_THREADS=1 pytest benchmarks/test_peers.py --benchmark-json=benchmarks/results/peers.json``, after

``pip install torch==2.13.0 -e ".[peers]" && pip install --no-deps -r benchmarks/peers/requirements.txt``

Every layer of a random 9M Llama is edited in fp32, at batch 1 and in a batch of eight rows that differ: two edits and a
plain row in turn. Correctness comes first (``benchmarks/peers/correctness.py``). Then the stock model and a steered
copy decode in turn from prompts of one token, so that every forward is a decode step. ``ratio_to_stock`` is time over
the stock model's within a round, ``added_us_per_layer_token`` the difference by layer and decode step, both as
quartiles, in CPU time of the one thread, which other work on the machine disturbs less; ``wall_ratio_to_stock`` is by
the clock on the wall.
``stock again`` is a second copy of the stock model: the noise floor.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import effort
from benchmarks.peers.absent import ABSENT, Absent
from benchmarks.peers.adapter import INSTALL, Adapter, Inputs, Kind, Rows, Steered, generate
from benchmarks.peers.correctness import Case, Verdict, first_line, generating, judge
from benchmarks.peers.registry import ADAPTERS
from benchmarks.shapes import SHAPES, random_llama
from steerkern.timing import Contender, Quartiles, interleave

SHAPE = "9M"
LAYERS = SHAPES[SHAPE]["num_hidden_layers"]
TOKENS, ROUNDS, WARMUP, MIXED = 16, 9, 1, 8
BATCHED = ("add", "ablate")
PEERS = {peer.name: peer for peer in ADAPTERS}
CASES = [(name, kind, 1) for name, peer in PEERS.items() for kind in peer.edits]
CASES += [(name, kind, MIXED) for name, kind, _ in CASES if kind in BATCHED]


@functools.cache
def stock() -> Any:
    """The model that is timed and copied, never changed."""
    return random_llama(SHAPE)


@functools.cache
def verdict(peer: Adapter, kind: Kind) -> Verdict:
    """The checks of a peer, run once."""
    return judge(peer, stock(), kind)


def prompts(batch: int) -> Inputs:
    ids = torch.randint(3, 500, (batch, 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def edits(peer: Adapter, kind: Kind, batch: int) -> Rows:
    """One edit, or in turn two edits and a plain row."""
    case = Case(peer, stock(), kind)
    one, two = case.edit(1), case.edit(2)
    return [one] if batch == 1 else [(one, two, None)[row % 3] for row in range(batch)]


def measure(steered: Steered, batch: int) -> dict[str, Any]:
    """Time of a steered model over the stock model's and what it adds, as quartiles over rounds."""
    inputs = prompts(batch)
    busy: dict[str, list[float]] = {"stock": [], "peer": []}

    def clocked(name: str, run: Callable[[Inputs, int], object]) -> Contender:
        def once() -> None:
            start = time.process_time()
            run(inputs, TOKENS)
            busy[name].append(time.process_time() - start)

        return Contender(name, once)

    plain = functools.partial(generate, stock())
    contenders = [clocked("stock", plain), clocked("peer", steered.generate)]
    wall = interleave(contenders, rounds=effort.rounds(ROUNDS), warmup=WARMUP).speedup("stock", "peer")
    pairs = list(zip(busy["stock"], busy["peer"], strict=True))[WARMUP:]
    added = Quartiles.of([1e6 * (peer - plain) / (LAYERS * TOKENS) for plain, peer in pairs])
    ratio = Quartiles.of([peer / plain for plain, peer in pairs])
    return {
        "added_us_per_layer_token": [round(x, 2) for x in added],
        "ratio_to_stock": [round(x, 4) for x in ratio],
        "wall_ratio_to_stock": [round(x, 4) for x in wall],
        "load": round(os.getloadavg()[0], 1),
    }


def label(kind: str, batch: int) -> str:
    return kind if batch == 1 else f"{kind}, mixed batch of {batch}"


def missing(peer: Adapter, batch: int) -> str:
    """Why it cannot be timed; empty if it can."""
    if peer.version is None:
        return f"not installed: {INSTALL}"
    if batch > 1 and not peer.per_row:
        return "its API gives every row of a batch the same edit"
    return ""


def failure(peer: Adapter, rows: Rows, batch: int) -> str:
    """What a peer raises when it decodes two tokens; empty if nothing."""
    try:
        with peer.steer(copy.deepcopy(stock()), rows) as steered:
            steered.generate(prompts(batch), 2)
    except Exception as error:  # whatever a peer raises is the reason
        return first_line(error)
    return ""


def not_run(benchmark: Any, peer: Adapter | Absent, reason: str, install: str) -> None:
    benchmark.extra_info |= {"status": "not run", "reason": reason, "correct": {}, "install": install}
    benchmark.extra_info |= {"peer": peer.name, "authors_figure": theirs(peer)}
    benchmark.pedantic(lambda: reason)  # the format has no result without a time
    print(f"\n{peer.name}: not run, {reason}")


def theirs(peer: Adapter | Absent) -> str | None:
    return f"{peer.authors_figure} (theirs, other hardware)" if peer.authors_figure else None


@pytest.mark.parametrize(("name", "kind", "batch"), CASES)
def test_peer(benchmark: Any, name: str, kind: Kind, batch: int) -> None:
    peer = PEERS[name]
    benchmark.extra_info |= {"edit": label(kind, batch), "version": peer.version, "note": peer.note}
    rows = edits(peer, kind, batch)
    reason = missing(peer, batch) or failure(peer, rows, batch)
    if reason:
        return not_run(benchmark, peer, reason, "" if peer.version else INSTALL)
    found = verdict(peer, kind)
    with peer.steer(copy.deepcopy(stock()), rows) as steered:
        benchmark.extra_info |= measure(steered, batch)
        benchmark.pedantic(lambda: steered.generate(prompts(batch), TOKENS))
    benchmark.extra_info |= {"peer": peer.name, "status": "run", "correct": found.correct, "raised": found.raised}
    benchmark.extra_info |= {"authors_figure": theirs(peer), "install": INSTALL, "patched": peer.needs_patch}
    added, ratio = (benchmark.extra_info[key][1] for key in ("added_us_per_layer_token", "ratio_to_stock"))
    wrong = [check for check, outcome in found.correct.items() if outcome == "no"]
    print(f"\n{peer.name}, {label(kind, batch)}: {added:+.1f} us, {ratio:.3f} of stock, wrong: {wrong or 'nothing'}")


@pytest.mark.parametrize("batch", [1, MIXED])
def test_stock_again(benchmark: Any, batch: int) -> None:
    again = generating(copy.deepcopy(stock()))
    benchmark.extra_info |= {"peer": "stock again", "version": None, "edit": label("none", batch), "status": "run"}
    benchmark.extra_info |= {"correct": {}, "authors_figure": None, "install": INSTALL}
    benchmark.extra_info |= measure(again, batch)
    benchmark.extra_info["again"] = benchmark.extra_info["ratio_to_stock"][1]
    benchmark.pedantic(lambda: again.generate(prompts(batch), TOKENS))
    print(f"\nstock again, batch {batch}: {benchmark.extra_info['again']:.3f}")


@pytest.mark.parametrize("name", [peer.name for peer in ABSENT])
def test_absent(benchmark: Any, name: str) -> None:
    peer = next(peer for peer in ABSENT if peer.name == name)
    benchmark.extra_info |= {"edit": "any", "version": None}
    not_run(benchmark, peer, peer.reason, peer.home)
