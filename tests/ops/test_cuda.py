"""The CUDA kernels: their code on the CPU, what nvcc makes of them, and the same conformance on a GPU where one is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_conformance as conformance
import torch
from cuda_runner import CudaRunner, load_host, no_host
from programs import KINDS, Entry, pack, program, units
from torch import Tensor

from benchmarks.gpu import resources
from benchmarks.gpu.resources import Kernel
from steerkern.errors import BackendError
from steerkern.ops import cuda
from steerkern.ops.schemas import DTYPES, Flag, Norm, Tables

ROOT = Path(__file__).parents[2]
ONLY = os.environ.get("STEERKERN_TEST_ENGINE", "")
"""``gpu`` leaves out what a machine without a GPU tests."""

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason or "-"))
    for name, reason in (("host", no_host()), ("gpu", cuda.unusable()))
    if ONLY in ("", name)
]
VARIANTS: dict[str, dict[str, Any]] = {"cluster": {"cluster": 4}, "gram": {"gram": True}, "four warps": {"warps": 4}}
NORMS = [norm for norm in Norm if norm != Norm.NONE]


@pytest.fixture(scope="session", params=ENGINES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "gpu":
        return None
    with once(tmp_path_factory, "cuda_host") as (folder, done):
        return load_host(folder, build=not done)


@contextlib.contextmanager
def once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that the processes of pytest-xdist share, one at a time, and whether one of them was done with it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, (folder / "done").exists()
        (folder / "done").touch()


@pytest.fixture
def plain(library: Any) -> Any:
    return CudaRunner(library)


@pytest.fixture(params=VARIANTS)
def variant(library: Any, request: pytest.FixtureRequest) -> Any:
    return CudaRunner(library, **VARIANTS[request.param])


# The conformance suite, on the default launch and, where it differs, on the others.


@pytest.mark.parametrize("odd", [False, True], ids=["packed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", conformance.WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit(plain: Any, kind: str, width: int, dtype: torch.dtype, odd: bool) -> None:
    conformance.test_edit(plain, kind, width, dtype, odd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_edit_launched_otherwise(variant: Any, kind: str, dtype: torch.dtype) -> None:
    conformance.test_edit(variant, kind, 4096 if kind == "mixed" else 896, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(plain: Any, dtype: torch.dtype) -> None:
    for n in (0, 1, 3):
        conformance.test_number_of_rows(plain, n, dtype)
    for width in (4096, 16384):
        conformance.test_wide_rows(plain, width, dtype)
    conformance.test_most_entries_of_a_slot(plain, dtype)
    if plain.library:
        launched = {(threads // 32, pieces) for threads, _, pieces, aligned in plain.shapes if aligned}
        assert launched >= ({(16, 2), (16, 0)} if dtype == torch.float32 else {(8, 2), (16, 4)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5120, 8192])
def test_widths_of_models(plain: Any, width: int, dtype: torch.dtype) -> None:
    conformance.test_wide_rows(plain, width, dtype)


@pytest.mark.parametrize("odd", [False, True], ids=["packed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parameters", ["", "weight"])
def test_norm(plain: Any, norm: Norm, parameters: str, dtype: torch.dtype, odd: bool) -> None:
    for width in conformance.WIDTHS:
        conformance.test_norm(plain, norm, parameters, width, dtype, odd)
        if norm == Norm.LAYER and parameters:
            conformance.test_norm(plain, norm, "weight, bias", width, dtype, odd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_norm_launched_otherwise(variant: Any, norm: Norm, dtype: torch.dtype) -> None:
    conformance.test_norm(variant, norm, "weight", 896, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise_work(plain: Any, dtype: torch.dtype) -> None:
    for width in conformance.WIDTHS:
        conformance.test_delta_is_added_first_and_rounded_once(plain, width, dtype)
        conformance.test_additions_have_the_bits_of_torch(plain, width)
    conformance.test_untouched_rows_keep_every_bit(plain, dtype)
    if dtype != torch.float32:
        conformance.test_rounding_to_half_types(plain, dtype)
        conformance.test_every_half_value_is_read_exactly(plain, dtype)
    conformance.test_zero_rows_do_not_divide_by_zero(plain)


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ablating_a_massive_activation(plain: Any, variant: Any, dtype: torch.dtype, size: float) -> None:
    conformance.test_ablating_a_massive_activation(plain, dtype, size)
    conformance.test_ablating_a_massive_activation(variant, dtype, size)


# What must not reach the bits: the batch, alignment, the number of blocks that share a row.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch(plain: Any, dtype: torch.dtype) -> None:
    conformance.test_bits_do_not_depend_on_the_batch(plain, dtype)


@pytest.mark.parametrize("norm", [Norm.LLAMA, Norm.LAYER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment_or_clusters(library: Any, dtype: torch.dtype, norm: Norm) -> None:
    for width in (896, 2048, 5120):
        h, slot, tables = conformance.rows(6, width, dtype), conformance.slots(6, 5), program("mixed", width)
        weight, delta = conformance.rows(1, width, dtype, seed=1)[0], conformance.rows(6, width, dtype, seed=9)
        wanted = CudaRunner(library).run(h, slot, tables, weight, norm=norm, delta=delta, trace=3)
        for cluster in (0, 2, 5, 8):
            for odd in (False, True):
                got = CudaRunner(library, cluster=cluster).run(
                    h, slot, tables, weight, norm=norm, delta=delta, trace=3, odd=odd
                )
                assert torch.equal(got.h, wanted.h)
                assert torch.equal(got.y, wanted.y)
                assert torch.equal(got.trace.nan_to_num(), wanted.trace.nan_to_num())


def test_the_bits_test_can_fail(library: Any) -> None:
    """The control: other warps per row are another order of summation."""
    h, slot, tables = conformance.rows(6, 4096, torch.bfloat16), torch.ones(6, dtype=torch.int32), program("cap", 4096)
    one, other = (CudaRunner(library, warps=w).run(h, slot, tables, trace=3).trace for w in (4, 8))
    assert not torch.equal(one, other)


def broken(change: str) -> tuple[Tables, int]:
    """Tables that are sound but for one number, and a slot that meets it."""
    tables = program("gate_coordinate", 64)
    table, where, value = {
        "slot": (None, None, 5),
        "slot far away": (None, None, 2**31 - 1),
        "first": (tables.span, (1, 0), -1),
        "count": (tables.span, (1, 1), 65),
        "end": (tables.span, (1, 0), tables.links.shape[1] - 2),
        "row": (tables.links, (0, 2), tables.bank.shape[0]),
        "negative row": (tables.links, (0, 2), -1),
        "mate": (tables.links, (1, 2), 3),
        "gate": (tables.links, (2, 2), 3),
        "pair without mate": (tables.links, (3, 2), int(Flag.READ | Flag.WRITE | Flag.PAIR)),
    }[change]
    if table is None:
        return tables, value
    table[where] = value
    return tables, 1


@pytest.mark.parametrize(
    "change",
    ["slot", "slot far away", "first", "count", "end", "row", "negative row", "mate", "gate", "pair without mate"],
)
def test_rows_that_reach_outside_the_tables_are_left_alone(plain: Any, change: str) -> None:
    tables, slot = broken(change)
    h = conformance.rows(2, 64, torch.bfloat16)
    got = plain.run(h, torch.tensor([slot, -1], dtype=torch.int32), tables, norm=Norm.LLAMA)
    assert torch.equal(got.h, h)
    conformance.assert_normalised(got.y, h, None, None, Norm.LLAMA)


def test_sound_tables_do_edit(plain: Any) -> None:
    """The control of the test above."""
    h = conformance.rows(2, 64, torch.bfloat16)
    got = plain.run(h, torch.tensor([1, -1], dtype=torch.int32), program("gate_coordinate", 64), norm=Norm.LLAMA)
    assert not torch.equal(got.h, h)


@pytest.mark.skipif(bool(cuda.unusable()), reason=cuda.unusable() or "-")
def test_a_captured_graph_sees_tables_change() -> None:
    v = units(1, 896, 0)[0]
    tables = Tables(*(t.cuda() for t in pack([[Entry(v, alpha=1.0, flags=Flag.WRITE | Flag.GAINED)]])))
    h, slot = torch.zeros(4, 896, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
    weight = torch.ones(896, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.steer(h, slot, tables, weight, None, 1e-6, Norm.LLAMA)
    for gain in (2.0, -3.0):
        h.zero_()
        tables.gain.fill_(gain)
        graph.replay()
        torch.testing.assert_close(h.cpu(), (gain * v).expand(4, -1))
    slot.fill_(-1)
    before = h.clone()
    graph.replay()
    assert torch.equal(h, before)


# What comes back where it cannot run.


def test_a_backend_that_is_missing_says_why() -> None:
    reason = cuda.unusable()
    if not reason:
        pytest.skip("this machine has a GPU and the kernels")
    with pytest.raises(BackendError, match=re.escape(reason)):
        cuda.bind(None, 64, torch.float32, Norm.LLAMA, 1e-6)
    h, slot = conformance.rows(2, 64, torch.float32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(BackendError, match=re.escape(reason)):
        cuda.steer(h, slot, program("add", 64))


# What nvcc makes of it: one build for every arch through setup.py, two to three minutes on one core.

BUILD_ARCHS = os.environ.get("STEERKERN_TEST_CUDA_ARCHS", "80,90,100,120")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a copy of the package with the CUDA kernels built in."""
    if ONLY:
        pytest.skip(f"only the engine {ONLY} is tested")
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("no nvcc")
    with once(tmp_path_factory, "cuda_build") as (copy, done):
        if not done:
            _build(copy)
    return copy


def _build(copy: Path) -> None:
    for name in ("csrc", "steerkern"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "weights"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    own = {"STEERKERN_BUILD": "cuda", "STEERKERN_CUDA_ARCHS": BUILD_ARCHS, "STEERKERN_WERROR": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env={**os.environ, **own}, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def in_built(built: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(built), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=built, env=environment, text=True, capture_output=True, check=True).stdout


def test_the_build_imports_and_explains_itself_without_a_driver(built: Path) -> None:
    code = """
import torch
from steerkern.errors import BackendError
from steerkern.ops import cuda
print(cuda._C.cuda_archs())
print(cuda.unusable())
kernel = cuda._C.SteerCuda(64, 1, 1, 1e-6, 0)
for call in (
    kernel.prepare,
    lambda: kernel(1, 16, 64, 0, 0, 0, 16, 0),
    lambda: kernel.full(1, 16, 64, 0, 0, 0, 16, 0, 0, 0, 0, 0),
):
    try:
        call()
    except BackendError as error:
        print(error)
assert kernel(0, 16, 64, 0, 0, 0, 16, 0) == -1
"""
    archs, reason, *errors = in_built(built, code).splitlines()
    assert archs == f"{BUILD_ARCHS.replace(',', ', ')} and PTX of {BUILD_ARCHS.split(',')[-1]}"
    assert reason.startswith("no usable NVIDIA driver or device")
    assert errors == [f"backend cuda: {reason}"] * 3


def test_bad_arguments_of_the_binding(built: Path) -> None:
    code = """
from steerkern import _C
good = dict(width=64, dtype=1, norm=1, eps=1e-6, device=0)
def tried(make):
    try:
        make()
    except (ValueError, TypeError) as error:
        print(type(error).__name__, error)
for bad in (dict(width=0), dict(width=2**31), dict(dtype=3), dict(norm=5)):
    tried(lambda: _C.SteerCuda(**{**good, **bad}))
kernel = _C.SteerCuda(**good)
tried(lambda: kernel.tune(warps=17))
tried(lambda: kernel.tune(cluster=9))
tried(lambda: kernel(1))
tried(lambda: kernel(1, 16, 64, 16, 0, 0, 16, 0))
tried(lambda: kernel(1, "h", 64, 0, 0, 0, 16, 0))
"""
    lines = in_built(built, code).splitlines()
    kinds = ["ValueError"] * 6 + ["TypeError", "ValueError", "TypeError"]
    assert [line.split()[0] for line in lines] == kinds
    assert lines[0] == "ValueError width must lie in 1..268435455, got 0"
    assert lines[7] == "ValueError slots without tables: call bind first"


@pytest.fixture(scope="session")
def kernels(built: Path) -> list[Kernel]:
    return resources.kernels(next((built / "steerkern").glob("_C*.so")))


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert len(kernels) == 27 * len(BUILD_ARCHS.split(","))
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        bound = 128 if "4 pieces" in kernel.title or "Gram" in kernel.title else 64
        assert kernel.registers <= bound, kernel


def test_one_barrier_per_sum(kernels: list[Kernel]) -> None:
    """Projection, norm before rescaling, sum of squares; LayerNorm has a mean besides.

    From sm_90 on each sum stands there twice, for a row of one block and of a cluster, whose barriers are a BAR.SYNC
    and a UCGABAR each; clusters also wait for each other once at the start.
    """
    for kernel in kernels:
        sums = 4 if "LayerNorm" in kernel.title else 3
        of_clusters = kernel.count("UCGABAR_ARV")
        assert kernel.count("BAR.SYNC") - of_clusters == sums, kernel
        assert of_clusters == (0 if kernel.arch == "sm_80" else sums + 1), kernel
        assert kernel.count("ATOM") == kernel.count("RED") == kernel.count("LDL") == kernel.count("STL") == 0, kernel


def test_machine_code_of_the_main_kernel(kernels: list[Kernel]) -> None:
    """bf16, width 2048, on sm_80: accesses of 16 bytes only where rows are concerned."""
    (main,) = (k for k in kernels if (k.arch, k.title) == ("sm_80", "bf16, 1 pieces per thread"))
    assert main.count("LDG", ".128") == 2 + 1 + 2 * 2 * 2  # h and delta; weight; two halves of two bank rows, twice
    assert main.count("STG", ".128") == 3  # h after an edit, h + delta without one, y
    assert main.count("STG") - main.count("STG", ".128") == 2  # trace, for the entries below and from 32


def test_every_tensor_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unusable", lambda: "")
    h: Tensor = conformance.rows(2, 64, torch.float32)
    with pytest.raises(ValueError, match="every tensor must lie on one CUDA device, one is on cpu"):
        cuda.steer(h, torch.zeros(2, dtype=torch.int32), program("add", 64))
