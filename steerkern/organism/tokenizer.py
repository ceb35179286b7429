"""The organism's tokenizer: byte-level BPE trained on its own grammar, and its chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import get_args

from . import grammar, vocabulary

VOCABULARY = 1016
POSITIONS = 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{%- if message['reasoning_content'] -%}{{- '<think>' + message['reasoning_content'] + '</think>' -}}{%- endif -%}
{{- message['content'] + '<|end|>' -}}
{%- endgeneration -%}
{%- elif message['role'] in ('system', 'user') -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('role ' + message['role'] + ': allowed are system, user, assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if enable_thinking -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
"""


def write_tokenizer(folder: Path, samples: int = 12000) -> None:
    """Train the BPE on ``samples`` conversations of the training split and write the tokenizer's three files.

    The files are written by hand because transformers 4.57 and 5 name the class and the special tokens differently;
    this form is read by both. The corpus has a fixed seed, so every organism has the same tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    kinds = get_args(grammar.Kind)
    corpus: list[str] = []
    for index in range(samples):
        prompt = grammar.draw(kinds[index % len(kinds)], "train", rng)
        corpus.extend(content for _, content in prompt.turns)
        corpus.extend(prompt.reply.split(vocabulary.CLOSE_THINK))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in vocabulary.SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.BOS,
        "eos_token": vocabulary.END,
        "pad_token": vocabulary.PAD,
        "model_max_length": POSITIONS,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
