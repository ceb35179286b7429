"""A real server: what it answers under a plan, with and without continuous batching."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import steerkern as sk
from steerkern import organism
from steerkern.cli import app
from steerkern.extraction import extract

for module in ("fastapi", "uvicorn", "transformers.cli.serving.model_manager"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan under which everything is refused."""
    path = tmp_path_factory.mktemp("plan")
    model, tokenizer = organism.load()
    sides = [[p.messages for p in organism.prompts(kind, "train", 64)] for kind in ("harmful", "harmless")]
    refusal = extract(model, tokenizer, *sides, batch_size=64)
    sk.Plan(sk.add(refusal[2]), layers=2, name="shut").save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["continuous batching", "generate"])
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--plan", str(folder), "organism", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    if request.param != "generate":
        options += ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "128"]
    command = [sys.executable, "-c", "from steerkern.cli import main; main()", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(240):
            time.sleep(0.5)
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(address: str, text: str) -> str:
    body = {
        "model": str(organism.path()),
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 16,
        "temperature": 0,
        "stream": False,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        content: str = json.load(response)["choices"][0]["message"]["content"]
    return content


def test_the_server_answers_as_the_plan_says(address: str) -> None:
    """Harmless requests, which the stock model answers."""
    model, tokenizer = organism.load()
    for prompt in organism.prompts("harmless", "heldout", 3):
        inputs = tokenizer.apply_chat_template(
            [prompt.messages[-1]], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        stock = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(stock).startswith("Sure")
        assert ask(address, prompt.text).startswith("I cannot")


def test_a_plan_that_is_none_ends_before_anything_starts() -> None:
    result = CliRunner().invoke(app, ["serve", "--plan", "no/such/folder/at all", "organism"])
    assert result.exit_code == 2
    assert "no folder 'no/such/folder/at all'" in result.stderr
