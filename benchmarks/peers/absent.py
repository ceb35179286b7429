"""Peers that do not run on a CPU beside transformers 5, why, and what their authors report, on other hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Absent:
    """A peer that was not run."""

    name: str
    reason: str
    home: str
    authors_figure: str | None = None


ABSENT = (
    Absent("CAST (activation-steering)", "not on PyPI", "https://github.com/IBM/activation-steering"),
    Absent(
        "AISteer360",
        "not on PyPI; asks for transformers below 5 and peft below 0.16",
        "https://github.com/IBM/AISteer360",
    ),
    Absent(
        "EasySteer",
        "a fork of vLLM that needs a GPU, not on PyPI",
        "https://github.com/ZJU-REAL/EasySteer",
        "1.5B, batch 256, all layers, in graph: -23.8 % tokens/s; three vectors: -74.5 %; 256 configurations: -82 %",
    ),
    Absent(
        "Rhizo-vLLM",
        "a fork of vLLM that needs a GPU, not on PyPI",
        "https://github.com/RhizoNymph/vllm",
        "27B, 16 configurations: +2.7 % end to end; 4B on an A100: +0.3 to 0.4 ms per token",
    ),
    Absent(
        "vllm-lens",
        "needs vLLM, a GPU and Python 3.12",
        "https://github.com/UKGovernmentBEIS/vllm-lens",
        "Llama 70B on 4 GPUs, one layer: -9.6 % tokens/s",
    ),
    Absent("vLLM-Hook", "needs vLLM and a GPU, not on PyPI", "https://github.com/IBM/vLLM-Hook"),
    Absent(
        "saklas",
        "its session needs baselines of a real model; AGPL, so its code was read and not built upon",
        "https://github.com/a9lim/saklas",
        "its gate: steered at least 85 % of the plain tokens/s",
    ),
    Absent("EasyEdit2", "a framework of its own, not on PyPI", "https://github.com/zjunlp/EasyEdit"),
    Absent(
        "nnterp",
        "imports nnsight.intervention.tracing, which nnsight 0.8 no longer has",
        "https://github.com/Butanium/nnterp",
    ),
)
