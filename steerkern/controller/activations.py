"""Cached states of a frozen model: what a controller reads of each prompt, in memory or in a safetensors file."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts import Fingerprint
from ..decisions import Read
from ..errors import ArtifactError
from ..extraction import Prompt, Rendered, capture, render
from ..runtime.decoder import find_decoder, text_config

_STAND_IN: list[dict[str, str]] = [{"role": "user", "content": "STEERKERNinstruction"}]
_NAME = "states"


def cache_states(
    model: Any,
    rendered: Sequence[Rendered],
    reads: Sequence[Read],
    *,
    file: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    label: str = "reading states",
) -> Tensor:
    """What ``reads`` see of each prompt in the frozen model: float32 ``[N, R, H]`` on the CPU, in the prompts' order.

    One batch of the model's states is held at a time; with ``file`` the result lies in that safetensors file, which
    :func:`open_states` opens again, and memory holds only the pages in use.

    Raises:
        ValueError: no prompt, prompts that the model cannot read (all before it runs), a read that is no layer of it or
            no token counted from the prompt's end, or states that are NaN or Inf: names the prompt and the layer.
        ArtifactError: the file cannot be written.
    """
    _, width, depth = fingerprint(model)
    rows = [_row(read, depth) for read in reads]
    tokens = sorted({int(read.token) for read in reads})
    columns = [tokens.index(int(read.token)) for read in reads]
    batches = capture(model, rendered, tokens, batch_size=batch_size, progress=progress, label=label)
    shape = (len(rendered), len(rows), width)
    made = torch.empty(shape) if file is None else _create(Path(file), shape, reads)
    for batch in batches:
        found = batch.states[rows, :, columns].transpose(0, 1).float()
        bad = (~torch.isfinite(found)).any(-1).nonzero()
        if len(bad):
            prompt, read = bad[0].tolist()
            raise ValueError(f"prompt {batch.prompts[prompt]}: {reads[read]} is NaN or Inf, so it trains nothing")
        made[list(batch.prompts)] = found
    return made


def open_states(file: str | os.PathLike[str], reads: Sequence[Read]) -> Tensor:
    """The states of a file that :func:`cache_states` wrote for the same reads, ``[N, R, H]``, mapped into memory.

    Raises:
        ArtifactError: no such file, not one of states, or states of other reads.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(file).name
    try:
        with safe_open(file, "pt") as opened:
            seen = (opened.metadata() or {}).get("reads")
            found = opened.get_tensor(_NAME) if _NAME in opened.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{name} is not a readable safetensors file: {error}") from None
    if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.dim() != 3 or seen is None:
        raise ArtifactError(f"{name} holds no cached states")
    if seen != _names(reads):
        raise ArtifactError(f"{name} holds the states of {seen}, wanted are {_names(reads)}")
    return found


def without_header(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Rendered]:
    """The same prompts without the generation header, as the released code caches them: their last token is another.

    Plain text has no header and stays as it is.

    Raises:
        ValueError: the template's header is not the end of the prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(rendered)
    whole, bare = (tokenizer.apply_chat_template(_STAND_IN, tokenize=False, add_generation_prompt=on) for on in (1, 0))
    if not whole.startswith(bare):
        raise ValueError("the chat template writes another conversation without its generation header")
    header = whole[len(bare) :]
    made = []
    for i, prompt in enumerate(rendered):
        if not prompt.text.endswith(header):
            raise ValueError(f"prompt {i} does not end with the generation header {header!r}")
        ids = tokenizer(prompt.text.removesuffix(header), add_special_tokens=False)["input_ids"]
        made.append(dataclasses.replace(prompt, text=prompt.text.removesuffix(header), ids=tuple(ids)))
    return made


def rendered_for(tokenizer: Any, prompts: Sequence[Prompt], *, system: str | None = None) -> list[Rendered]:
    """Prompts through the chat template, or as plain text where the tokenizer has none."""
    template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    return render(tokenizer, prompts, system=system, template=template)


def fingerprint(model: Any) -> Fingerprint:
    """The model's type, width and number of decoder blocks."""
    _, blocks = find_decoder(model)
    return Fingerprint(str(model.config.model_type), int(text_config(model).hidden_size), len(blocks))


def _row(read: Read, depth: int) -> int:
    """Which of the captured ``[L+1]`` states it is: ``resid_post[l]`` is ``resid_pre[l + 1]``."""
    if read.site not in ("resid_pre", "resid_post"):
        raise ValueError(f"{read}: a controller is trained on resid_pre or resid_post")
    if read.token == "mean" or read.token >= 0:
        raise ValueError(f"{read}: a controller is trained on tokens counted from the prompt's end")
    if not 0 <= read.layer < depth:
        raise ValueError(f"{read}: the model has {depth} decoder layers (0..{depth - 1})")
    return read.layer + (read.site == "resid_post")


def _names(reads: Iterable[Read]) -> str:
    return "; ".join(map(str, reads))


def _create(file: Path, shape: tuple[int, int, int], reads: Sequence[Read]) -> Tensor:
    """A safetensors file of one float32 tensor, still zero, mapped into memory for writing."""
    size = 4 * int(np.prod(shape))
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"reads": _names(reads)}, _NAME: entry}).encode()
    header += b" " * (-len(header) % 8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + size)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", 8 + len(header), shape))
    except OSError as error:
        raise ArtifactError(f"cannot write {file}: {error.strerror or error}") from None
