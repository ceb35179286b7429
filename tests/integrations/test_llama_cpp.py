"""Control vectors in llama.cpp itself: the same file, the same token ids, the logits of our session.

Layers: ``direction.N`` of the file is what llama.cpp adds to the output of block ``N``, our ``resid_post[N]``. It has
none for block 0. Run with::

    pip install cmake ninja && pip install --no-binary llama-cpp-python llama-cpp-python   # a CPU build, some minutes
    pytest tests/integrations/test_llama_cpp.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern import organism
from steerkern.integrations.gguf import write_gguf

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not installed: pip install --no-binary llama-cpp-python llama-cpp-python"
)
Floats = NDArray[np.float32]
SCALE = 1.5


class Engine:
    """One model in llama.cpp, on one CPU thread, its keys and values in float32."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp does not load {path.name}"
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.layers = llama_cpp.llama_model_n_layer(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, ids: list[int], prompt: int, vector: Floats | None = None, first: int = 1) -> Floats:
        """``[len(ids), words]``: ``prompt`` ids in one forward, the others one by one, steered by ``vector``."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 64, 1, 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self.model, settings)
        try:
            if vector is not None:
                data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                code = llama_cpp.llama_set_adapter_cvec(context, data, vector.size, self.width, first, self.layers)
                assert code == 0
            rows = [self._decode(context, ids[:prompt], 0)]
            rows += [self._decode(context, [token], at) for at, token in enumerate(ids[prompt:], prompt)]
            return np.concatenate(rows)
        finally:
            llama_cpp.llama_free(context)

    def _decode(self, context: Any, ids: list[int], past: int) -> Floats:
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, past + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self.words,)).copy()
                for i in range(len(ids))]  # fmt: skip
        llama_cpp.llama_batch_free(batch)
        return np.stack(rows)


def load_vector(path: Path, width: int, layers: int, scale: float) -> Floats:
    """``[(layers - 1) * width]`` as llama.cpp's own loader lays a file out: block 1 first, absent ones zero."""
    data = np.zeros((layers - 1, width), np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        data[int(tensor.name.removeprefix("direction.")) - 1] += scale * tensor.data
    return data.reshape(-1)


@pytest.fixture(scope="module", params=["F32", "F16", "Q8_0"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> LlamaForCausalLM:
    model, _ = organism.load()
    from tests.integrations.llama_gguf import round_matrices

    round_matrices(model, kind)
    return model


@pytest.fixture(scope="module")
def engine(model: LlamaForCausalLM, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from tests.integrations.llama_gguf import write_llama

    path = tmp_path_factory.mktemp("model") / "organism.gguf"
    write_llama(model, path, kind)
    engine = Engine(path)
    yield engine
    llama_cpp.llama_model_free(engine.model)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 900, (12,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def directions() -> sk.Directions:
    generator = torch.Generator().manual_seed(1)
    return sk.Directions.of({layer: torch.randn(64, generator=generator) for layer in (1, 3)}, "resid_post")


def ours(model: LlamaForCausalLM, ids: list[int], plan: sk.Plan | None) -> Floats:
    with torch.no_grad():
        if plan is None:
            return model(torch.tensor([ids])).logits[0].numpy()
        with sk.steer(model, plan):
            return model(torch.tensor([ids])).logits[0].numpy()


def plan_of(directions: sk.Directions) -> sk.Plan:
    return sk.Plan(sk.add(directions, SCALE), site="resid_post", name="control")


def distance(one: Floats, other: Floats) -> float:
    return float(np.abs(one - other).max())


def test_logits_with_the_control_vector_are_ours(
    engine: Engine, model: LlamaForCausalLM, kind: str, ids: list[int], directions: sk.Directions, tmp_path: Path
) -> None:
    write_gguf(directions, tmp_path / "control.gguf")
    vector = load_vector(tmp_path / "control.gguf", engine.width, engine.layers, SCALE)
    plain = ours(model, ids, None)
    error = distance(engine.logits(ids, 8), plain)
    # by how much the two differ without steering: sums in another order, activations that llama.cpp rounds too
    assert error <= {"F32": 1e-4, "F16": 0.05, "Q8_0": 0.6}[kind]
    steered = ours(model, ids, plan_of(directions))
    assert distance(steered, plain) > 20 * error
    assert distance(engine.logits(ids, 8, vector), steered) <= max(2 * error, 1e-4)


def test_another_layer_convention_would_show(
    engine: Engine, model: LlamaForCausalLM, ids: list[int], directions: sk.Directions, tmp_path: Path
) -> None:
    write_gguf(directions, tmp_path / "control.gguf")
    vector = load_vector(tmp_path / "control.gguf", engine.width, engine.layers, SCALE)
    right = engine.logits(ids, 8, vector)
    earlier = sk.Directions.of({layer: one.raw for layer, one in directions.items()}, "resid_pre")
    plan = sk.Plan(sk.add(earlier, SCALE), name="one-block-earlier")
    effect = distance(right, ours(model, ids, None))
    assert distance(right, ours(model, ids, plan)) > 0.2 * effect


def test_block_0_is_left_alone(engine: Engine, ids: list[int]) -> None:
    """So the format starts at block 1: what stands first in the buffer is block 1's, whatever ``first`` is."""
    vector = np.zeros((engine.layers - 1, engine.width), np.float32)
    vector[0] = 3.0
    plain, from_1 = engine.logits(ids, 8), engine.logits(ids, 8, vector.reshape(-1), first=1)
    assert distance(from_1, plain) > 0.1
    assert distance(engine.logits(ids, 8, vector.reshape(-1), first=0), from_1) == 0.0
    assert distance(engine.logits(ids, 8, vector.reshape(-1), first=2), plain) == 0.0
