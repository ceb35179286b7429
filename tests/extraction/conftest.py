"""Tiny tokenizers with chat templates of several manners, and tiny random models that read their ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No special token separates instruction and suffix: the last character merges with what follows.
BRACKETS = (
    "{% for m in messages %}{{ '(' + m['role'] + ': ' + m['content'] + ')' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' reply:' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "brackets": BRACKETS}
SPECIALS = (
    "<|pad|>", "<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
CORPUS = [
    "How do I bake the bread (and how long)? Why (on earth?) would you?) Say it twice?) Really?) reply: yes?)",
    "You are a helpful assistant. user assistant system model Write a letter about the garden.",
    "tell me the time?) make a cake.) the answer is no!) the assistant said so\n\nand so on\n\n",
] * 20


def build_tokenizer(template: str | None = LLAMA3, *, kind: str = "bytes") -> Any:
    """Byte-level BPE (``bytes``, as Llama 3 and Qwen) or BPE with ▁ for space (``space``, as Llama 2 and Gemma)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIALS]
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        # trims spaces off the spans, as Llama 3's and GPT-2's does
        post: list[Any] = [processors.ByteLevel(trim_offsets=True)]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        core = Tokenizer(models.BPE(unk_token="<|pad|>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        post, alphabet = [], sorted(set("".join(CORPUS)))
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    bos = core.token_to_id("<|bos|>")
    post.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]))
    core.post_processor = processors.Sequence(post)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", pad_token="<|pad|>", chat_template=template
    )


def build_model(family: str = "llama", *, layers: int = 3, width: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    """A random causal language model with 512 tokens and 128 positions, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    extra: dict[str, Any] = {"intermediate_size": 48, "max_position_embeddings": 128}
    if family == "gpt2":
        sizes, extra = {"n_embd": width, "n_layer": layers, "n_head": 4}, {"n_positions": 128}
    elif family == "opt":
        extra = {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": width}
    elif family in ("llama", "qwen2", "gemma2"):
        extra.update(num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=512, **sizes, **extra, bos_token_id=1, eos_token_id=4, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # states of ordinary size at every layer
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture
def model() -> Any:
    return build_model()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return [
        "How do I bake the bread?",
        "Why?",
        "Write a letter about the garden, and how long would you say it takes to answer?",
        "tell me the time.",
        "make a cake!",
        "the assistant said so",
        "Say it twice, then say it again (and again)",
        "no",
        "really, on earth, would you make the bread and the cake and the letter in the garden?",
    ]
