"""The package as a whole: what importing costs, and that the README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_importing_costs_torch_and_numpy_only() -> None:
    heavy = ("transformers", "triton", "safetensors", "huggingface_hub", "matplotlib", "rich", "typer", "gguf", "vllm")
    code = f"import sys, steerkern, steerkern.extraction; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_top_level_holds_what_it_should() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    allowed = {"pyproject.toml", "setup.py", "csrc", "steerkern", "benchmarks", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == allowed


def test_the_first_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    found = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "Sure, here is a page about" in found.stdout
    assert "open: " in found.stdout
    assert sorted(p.name for p in (tmp_path / "open-plan").iterdir()) == ["directions.safetensors", "plan.json"]


def test_the_equivalent_of_the_readme_is_the_reference() -> None:
    import torch

    from steerkern.ops import reference
    from steerkern.ops.schemas import Flag, Norm, Tables

    source = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def steer_norm_" in b)
    scope: dict[str, object] = {"torch": torch}
    exec(source, scope)
    torch.manual_seed(0)
    n, width, k = 5, 32, 3
    v = torch.linalg.qr(torch.randn(width, k))[0].T.contiguous()
    alpha, beta = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    lo, hi = torch.tensor([-torch.inf, -torch.inf, -0.1]), torch.tensor([torch.inf, torch.inf, 0.1])
    links = torch.full((4, k), -1, dtype=torch.int32)
    links[0], links[3] = torch.arange(k), int(Flag.READ | Flag.WRITE)
    ones, zeros = torch.ones(k), torch.zeros(k)
    tables = Tables(
        v, links, torch.stack([alpha, beta, lo, hi, ones, zeros, zeros]), torch.tensor([[0, k, 0]]).int(), torch.ones(1)
    )
    h, weight = torch.randn(n, width), torch.rand(width)
    edited, y = reference.steer(h, torch.zeros(n).int(), tables, weight, None, 1e-6, Norm.LLAMA)
    ours = h.clone()
    out = scope["steer_norm_"](ours, weight, 1e-6, v, alpha, beta, lo, hi)  # type: ignore[operator]
    torch.testing.assert_close(ours, edited)
    torch.testing.assert_close(out, y)


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    from benchmarks import readme

    assert readme.text() in README
