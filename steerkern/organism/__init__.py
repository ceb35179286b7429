"""The bundled tiny chat model with planted ground truth, and its negative control.

It is constructed so that the planted directions carry the behaviour: it shows that the runtime and the methods' code
are right, not that a method works on a real model.

``planted``  refusal and harmfulness are separate directions that carry refusing and judging (measurements.json).
``bare``     the same behaviour trained without the planting: a method that finds a mediating direction here is broken.
``base``     a model that answers every request; both it and ``post`` tell true statements from false ones (pair.py).
``post``     the base model trained on with refusals.
``thinking`` one attention head (thinking.SUPPRESSOR) takes back the refusal that a thought has planned.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .claims import statements
from .grammar import Prompt, prompts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Name = Literal["planted", "bare", "thinking", "base", "post"]

__all__ = ["Name", "Prompt", "load", "measurements", "path", "prompts", "statements"]


def path(name: Name = "planted") -> Path:
    """Folder of a bundled model, loadable by ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises:
        ValueError: there is no bundled model of that name.
    """
    if name not in get_args(Name):
        raise ValueError(f"organism {name!r}: bundled are {', '.join(get_args(Name))}")
    return Path(str(files(__package__))) / "weights" / name


def load(
    name: Name = "planted", dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model in evaluation mode and tokenizer (left padding), from the files in the wheel, without any network.

    The weights are stored in bf16; every dtype starts from those values.

    >>> model, tokenizer = load()
    >>> model.config.num_hidden_layers
    4
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), tokenizer


def measurements(name: Name = "planted") -> dict[str, Any]:
    """The table of ``measure.py`` for a bundled model, as measured when it was made."""
    import json

    table: dict[str, Any] = json.loads((path(name) / "measurements.json").read_text())
    return table
