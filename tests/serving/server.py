"""vLLM's OpenAI-compatible server as a process, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import steerkern.organism
from tests.serving.asked import Ask
from tests.serving.models import Family, saved

if TYPE_CHECKING:
    import httpx

SECONDS = 240
"""Longest that a server may take to start, or to answer."""
CHATTY = Family("llama", "LlamaConfig", {"vocab_size": 1024})
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def chatty() -> Path:
    """A random model with the bundled models' tokenizer."""
    model = saved(CHATTY)
    for name in TOKENIZER:
        shutil.copy(Path(steerkern.organism.__file__).parent / "weights" / "planted" / name, model)
    return model


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str

    def body(self, ask: Ask, **more: Any) -> dict[str, Any]:
        """A completion request for an ask, whose plans are what ``vllm_xargs`` say."""
        asked = {} if ask.plans is None else {"vllm_xargs": ask.plans}
        return {
            "model": "tiny", "prompt": list(ask.prompt), "max_tokens": ask.new, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **asked, **more,
        }  # fmt: skip

    def post(self, route: str, body: Any) -> httpx.Response:
        """One request; ``body`` is JSON text or what becomes it."""
        import httpx

        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self.url}/v1/{route}", content=content, headers=headers, timeout=SECONDS)

    async def tokens(self, client: httpx.AsyncClient, ask: Ask, stop: int | None = None) -> list[int]:
        """A streamed reply; hung up on after ``stop`` tokens."""
        found: list[int] = []
        body = self.body(ask, stream=True)
        async with client.stream("POST", f"{self.url}/v1/completions", json=body, timeout=SECONDS) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    found += json.loads(line[6:])["choices"][0]["token_ids"] or []
                if stop is not None and len(found) >= stop:
                    break
        return found


@contextlib.contextmanager
def serving(model: Path, settings: Mapping[str, Any], *flags: str) -> Iterator[Server]:
    """A server of a model under ``additional_config={"steerkern": settings}``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name",
        "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "16", "--block-size", "32", "--num-gpu-blocks-override", "64",
        "--additional-config", json.dumps({"steerkern": settings}), *flags,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with tempfile.NamedTemporaryFile("w+", prefix="server-", suffix=".log") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(process, url, Path(log.name))
            yield Server(url)
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-8000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
