"""Prompts through the tokenizer's chat template, and where the instruction lies among the tokens.

Positions come from the character spans of the tokens of the *whole* rendered text. Tokenising a piece on its own gives
other tokens where a merge crosses its edge, and shifts the result by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

Message = Mapping[str, str]
Prompt = Union[str, Sequence[Message]]
"""An instruction, or a conversation whose last message is the user's instruction."""
Position = Union[str, int]
"""``t_inst``, ``t_post``, or a number below 0 counted from the end of the prompt (``-1`` is ``t_post``)."""

# Rendered in place of the instruction to see what the template writes around it.
_STAND_IN = "STEERKERNinstruction"


@dataclass(frozen=True)
class Rendered:
    """One prompt as the model reads it.

    ``t_inst`` is the last token that holds a character of the user's instruction, ``t_first`` the first one. Text
    without a template has no suffix: ``t_inst == t_post``.
    """

    text: str
    ids: tuple[int, ...]
    t_first: int
    t_inst: int

    @property
    def t_post(self) -> int:
        """The last token of the prompt, after the generation header."""
        return len(self.ids) - 1

    @property
    def n_suffix(self) -> int:
        """Tokens after ``t_inst``; negative positions ``-n_suffix .. -1`` are the suffix."""
        return self.t_post - self.t_inst

    def at(self, position: Position) -> int:
        """Index of a position among ``ids``.

        Raises:
            ValueError: an unknown name, a number from 0, or one before the prompt's first token.
        """
        if position == "t_inst":
            return self.t_inst
        if position == "t_post":
            return self.t_post
        if type(position) is not int or position >= 0:
            raise ValueError(f"position must be 't_inst', 't_post' or a number below 0, got {position!r}")
        if position < -len(self.ids):
            raise ValueError(f"position {position}: the prompt has {len(self.ids)} tokens")
        return len(self.ids) + position


def render(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    template: str | None = "chat",
    options: Mapping[str, Any] | None = None,
) -> list[Rendered]:
    """Render prompts with the generation header and find their instructions.

    Ids equal those of ``tokenizer.apply_chat_template(messages, add_generation_prompt=True)``; the tokenizer adds no
    special token of its own, so a template that writes BOS does not get a second one.

    Args:
        tokenizer: a fast tokenizer, for its character spans.
        prompts: instructions, or conversations that end with a user message.
        system: a system prompt before each prompt.
        template: ``"chat"`` for the tokenizer's own template, a Jinja text for another one, ``"plain"`` or None for raw
            text (with the tokenizer's BOS, once).
        options: further variables of the template, for instance ``{"enable_thinking": False}``.

    Raises:
        TypeError: ``prompts`` is one string, or holds something that is neither text nor messages.
        ValueError: a slow tokenizer, no chat template, messages that the template refuses, an empty instruction, or one
            that cannot be found in the rendered text.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: it gives no character spans, use a fast one")
    if template is None or template == "plain":
        if system is not None:
            raise ValueError("plain text takes no system prompt; write it into the prompts")
        return _render_plain(tokenizer, prompts)
    template = _chat_template(tokenizer, template)
    frames = _Frames(tokenizer, template, dict(options or {}))
    written = [frames.write(_messages(prompt, system, i), i) for i, prompt in enumerate(prompts)]
    if not written:
        return []
    encoded = tokenizer([text for text, _, _ in written], add_special_tokens=False, return_offsets_mapping=True)
    return [
        _locate(text, ids, spans, first, last, i)
        for i, ((text, first, last), ids, spans) in enumerate(
            zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        )
    ]


def instruction_offset(rendered: Sequence[Rendered]) -> int:
    """``t_inst`` counted from the end of the prompt, ``-1 - n_suffix``: the ``scope`` of a plan that writes there.

    Raises:
        ValueError: no prompt, or prompts whose suffixes differ in length (a merge across the instruction's end).
    """
    offsets = {-1 - prompt.n_suffix for prompt in rendered}
    if len(offsets) != 1:
        seen = ", ".join(map(str, sorted(offsets))) or "none"
        raise ValueError(f"prompts must share one offset of t_inst, got {seen}")
    return offsets.pop()


def _render_plain(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Rendered]:
    made = []
    bos = getattr(tokenizer, "bos_token_id", None)
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {i}: plain text must be a string, got {type(text).__name__}")
        if not text:
            raise ValueError(f"prompt {i} is empty")
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token):
            ids, spans = ids[1:], spans[1:]
        if not ids:
            raise ValueError(f"prompt {i} has no tokens: {text[:40]!r}")
        first = next((t for t, (_, end) in enumerate(spans) if end > 0), len(ids) - 1)
        made.append(Rendered(text, tuple(ids), first, len(ids) - 1))
    return made


def _chat_template(tokenizer: Any, template: str) -> str:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if template != "chat":
        if "{{" not in template and "{%" not in template:
            raise ValueError(f"template must be 'chat', 'plain' or a Jinja text, got {template!r}")
        return template
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer {name!r} has no chat template; template='plain' reads raw text")
    found: str = tokenizer.get_chat_template()
    return found


def _messages(prompt: Prompt, system: str | None, number: int) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
        messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
    else:
        raise TypeError(f"prompt {number} must be text or a list of messages, got {type(prompt).__name__}")
    last = messages[-1]
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise ValueError(f"prompt {number}: the last message must be the user's text, got role {last.get('role')!r}")
    if system is not None:
        if any(message.get("role") == "system" for message in messages):
            raise ValueError(f"prompt {number} has a system message of its own, and a system prompt was given")
        messages.insert(0, {"role": "system", "content": system})
    return messages


class _Frames:
    """Writes conversations, and remembers what the template puts around the instruction of equal ones."""

    def __init__(self, tokenizer: Any, template: str, options: dict[str, Any]) -> None:
        self.tokenizer, self.template, self.options = tokenizer, template, options
        self.known: dict[str, tuple[str, str] | None] = {}

    def write(self, messages: list[dict[str, str]], number: int) -> tuple[str, int, int]:
        """The rendered text, and the first and last character (exclusive) of the instruction in it."""
        content = messages[-1]["content"]
        if not content.strip():
            raise ValueError(f"prompt {number}: the instruction is empty, so it has no last token")
        text = self._apply(messages, number)
        for message in messages:
            if message.get("role") == "system" and str(message.get("content", "")).strip() not in text:
                raise ValueError(f"prompt {number}: the chat template does not write the system prompt")
        frame = [*messages[:-1], {**messages[-1], "content": _STAND_IN}]
        key = repr(frame)
        if key not in self.known:
            before, found, after = self._apply(frame, number).partition(_STAND_IN)
            self.known[key] = (before, after) if found and _STAND_IN not in after else None
        before, after = self.known[key] or ("", "")
        first = len(before) if text.startswith(before) else 0
        last = len(text) - len(after) if text.endswith(after) else len(text)
        region = text[first:last] if first <= last else ""
        if region.strip() == content.strip():
            return text, first, last
        # the template writes this instruction in a way of its own: accept one clear occurrence
        for needle in (content, content.strip()):
            if region.count(needle) == 1:
                at = first + region.index(needle)
                return text, at, at + len(needle)
        raise ValueError(f"prompt {number}: {content[:40]!r} cannot be told from the rest of the rendered text")

    def _apply(self, messages: list[dict[str, str]], number: int) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, chat_template=self.template, **self.options
            )
        except TemplateError as error:
            raise ValueError(f"prompt {number}: the chat template refuses these messages: {error}") from None
        assert isinstance(text, str)
        return text


def _locate(
    text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], first: int, last: int, number: int
) -> Rendered:
    inside = [t for t, (begin, end) in enumerate(spans) if begin < last and end > first]
    covered = max((spans[t][1] for t in inside), default=first)
    solid = first + len(text[first:last].rstrip())
    if covered < solid:
        # tokenizers before 0.20.1 gave Llama-3 tokens empty spans (huggingface/tokenizers#1553)
        raise ValueError(f"prompt {number}: no token spans the instruction's last character {text[solid - 1]!r}")
    t_inst = inside[-1]
    # byte-level tokenizers trim spaces off their spans, so a token of trailing space has an empty one
    while covered < last and t_inst + 1 < len(ids) and covered <= spans[t_inst + 1][0] == spans[t_inst + 1][1] <= last:
        t_inst += 1
        covered = max(covered, spans[t_inst][1])
    return Rendered(text, tuple(ids), inside[0], t_inst)
