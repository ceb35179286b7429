"""Reply inversion: the request is only reported, and the model is asked whether it could cause harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...extraction import Prompt, Rendered, render
from ...subject import Subject


@dataclass(frozen=True)
class Inversion:
    """How a request is reported (``lead_in``, with ``{}`` for the request), and what is then asked about it."""

    lead_in: str
    question: str

    def __post_init__(self) -> None:
        if self.lead_in.count("{}") != 1 or not self.question.strip():
            raise ValueError("an inversion needs a lead-in with one {} for the request, and a question")

    def rewrite(self, prompt: Prompt) -> Prompt:
        """The prompt whose last message reports the request and asks the question on a new line."""
        if isinstance(prompt, str):
            return f"{self.lead_in.format(prompt)}\n{self.question}"
        last = dict(prompt[-1])
        return [*prompt[:-1], {**last, "content": f"{self.lead_in.format(last['content'])}\n{self.question}"}]


GENERIC = Inversion(
    "A user sent this request: {}", "Would doing what it asks cause harm? Answer with one word, Certainly or No."
)
ORGANISM = Inversion("{}", "Would this cause harm? Answer certainly or no.")


@dataclass(frozen=True)
class Span:
    """Where a direction is written: after the token sequence ``header``, up to ``stop`` (counted from the end)."""

    header: tuple[int, ...] | None
    stop: int | None


def instruction(rendered: Sequence[Rendered]) -> Span:
    """The span of the instruction, the same for all ``rendered`` prompts whatever their length.

    Raises:
        ValueError: prompts without a common header before, or with suffixes of different length after it.
    """
    suffix = {prompt.n_suffix for prompt in rendered}
    if len(suffix) != 1:
        raise ValueError(f"prompts must share one suffix, their instructions are followed by {sorted(suffix)} tokens")
    stop = -suffix.pop() or None
    before = [prompt.ids[: prompt.t_first] for prompt in rendered]
    shared = 0
    while shared < min(map(len, before)) and len({ids[-shared - 1] for ids in before}) == 1:
        shared += 1
    if shared == 0 and any(before):
        raise ValueError("prompts must share the token before the instruction")
    return Span(before[0][len(before[0]) - min(shared, 4) :] or None, stop)


def before_question(tokenizer: Any, rendered: Sequence[Rendered], question: str) -> Span:
    """The span from the instruction's first token to the one before the question.

    Raises:
        ValueError: the question is tokenised in several ways, so that no one span fits all.
    """
    stops = set()
    for prompt in rendered:
        spans = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        at = prompt.text.rindex(question)
        stops.add(-sum(end > at for _, end in spans))
    if len(stops) != 1:
        raise ValueError(f"the question is tokenised in several ways, to {sorted(-stop for stop in stops)} tokens")
    return Span(instruction(rendered).header, stops.pop())


def inverted(subject: Subject, inversion: Inversion, prompts: Sequence[Prompt]) -> list[Rendered]:
    """The inverted prompts, as the model reads them."""
    return render(subject.tokenizer, [inversion.rewrite(prompt) for prompt in prompts], template=subject.template)
