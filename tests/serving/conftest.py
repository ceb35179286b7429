"""A real vLLM on the CPU; ``tests/serving/run.sh`` makes the environment that these tests need.

What is asked of a model runner is asked of V1, and of V2 where ``VLLM_USE_V2_MODEL_RUNNER=1``: that runs on a CPU
through Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import types
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "steerkern",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # some of vLLM's functions are compiled in eager engines too
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts processes or compiles; `run.sh --quick` leaves it out")
    config.addinivalue_line("markers", "runner: asked of both of vLLM's model runners")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    if own and importlib.util.find_spec("vllm") is None:
        for item in own:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: tests/serving/run.sh installs it"))
        return
    if own:
        _before_vllm()


def _before_vllm() -> None:
    """What vLLM looks at when it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _interpret() -> None:
    """Let vLLM find a Triton that works, before anything imports that."""
    os.environ["TRITON_INTERPRET"] = "1"
    backends = importlib.import_module("triton.backends").backends
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    _interpret()
