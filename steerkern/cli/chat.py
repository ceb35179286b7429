"""``steerkern chat``: talk to a steered model, and change the strength of its plans while doing so."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Dtype, Model, Threads, load
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from ..plan import Plan
    from ..runtime.session import Session

HELP = """/plans             plans and their strengths
/scale NAME 0.5    strength of a plan, from the next token on; 1 is the plan as written
/add FOLDER        one more plan
/remove NAME       one plan less
/system TEXT       a system prompt (none: /system)
/reset             forget the conversation
/help              this
/quit              leave (or Ctrl-D); Ctrl-C ends a reply"""


def chat(
    plan: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a plan; may be repeated.", show_default=False)
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Replies end there at the latest.")] = 256,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON line per turn to stdout; everything else goes to stderr.")
    ] = False,
) -> Outcome:
    """Chat with a model under plans; /help lists what can be changed on the way."""
    from ..plan import Plan
    from ..runtime.session import steer

    plans = [Plan.from_pretrained(folder) for folder in plan or []]
    loaded = load(model, dtype, device, threads)
    session = steer(loaded.model, plans, silent="ignore")

    def converse(console: Console) -> None:
        with session:
            shown = type(console)(stderr=True) if as_json else console
            talk = Talk(loaded.model, loaded.tokenizer, session, plans, shown, max_new_tokens, system)
            talk.log = (lambda turn: print(json.dumps(turn), flush=True)) if as_json else None
            talk.say(f"{loaded.source}, backend {session.backend}; /help lists commands")
            talk.plans()
            for line in _lines(shown):
                if not talk.hear(line):
                    break

    return Outcome(None, converse)


@dataclass
class Talk:
    """One conversation under a session."""

    model: Any
    tokenizer: Any
    session: Session
    held: list[Plan]
    console: Console
    max_new_tokens: int
    system: str | None = None
    log: Callable[[dict[str, Any]], None] | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scales = {plan.name: 1.0 for plan in self.held}

    def hear(self, line: str) -> bool:
        """Answer a line or obey a command; False ends the conversation."""
        from ..errors import SteerkernError

        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self.reply(text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], object]] = {
            "plans": lambda _: self.plans(),
            "scale": self.scale,
            "add": self.add,
            "remove": self.remove,
            "system": self.set_system,
            "reset": lambda _: self.messages.clear(),
            "help": lambda _: self.say(HELP),
        }
        if name not in commands:
            self.say(f"no command /{name}; /help lists them")
            return True
        try:
            commands[name](rest.strip())
        except (SteerkernError, ValueError, OSError) as error:
            self.say(f"{error}")
        return True

    def say(self, text: str) -> None:
        """Print something that is no part of the conversation."""
        self.console.print(text, style="dim", markup=False)

    def plans(self) -> None:
        """List the plans and their strengths."""
        for plan in self.held:
            self.say(f"{plan.name} x {self.scales[plan.name]:g}: {plan!r}")
        if not self.held:
            self.say("no plan: the model is as it is; /add FOLDER adds one")

    def scale(self, text: str) -> None:
        """``NAME NUMBER``, or only a number where there is one plan."""
        name, _, number = text.rpartition(" ")
        name = name.strip() or (self.held[0].name if len(self.held) == 1 else "")
        if not name:
            raise ValueError("say which plan: /scale NAME NUMBER")
        try:
            scale = float(number)
        except ValueError:
            raise ValueError(f"{number!r} is no number: /scale NAME NUMBER") from None
        self.session.set(name, scale=scale)
        self.scales[name] = scale
        self.say(f"{name} x {scale:g}")

    def add(self, folder: str) -> None:
        """Hold one more plan."""
        from ..plan import Plan

        plan = Plan.from_pretrained(folder)
        self.session.add(plan)
        self.held.append(plan)
        self.scales[plan.name] = 1.0
        self.say(f"added {plan!r}")

    def remove(self, name: str) -> None:
        """Drop a plan."""
        self.session.remove(name)
        self.held = [plan for plan in self.held if plan.name != name]
        del self.scales[name]
        self.say(f"removed {name}")

    def set_system(self, text: str) -> None:
        """Another system prompt, and a new conversation."""
        self.system = text or None
        self.messages.clear()

    def reply(self, text: str) -> None:
        """One turn: the reply appears token by token; Ctrl-C ends it, and what was said stays."""
        asked = [*self.messages, {"role": "user", "content": text}]
        scales = dict(self.scales)
        stream = _Stream(self.tokenizer, lambda piece: self.console.print(piece, end="", markup=False))
        start = time.perf_counter()
        try:
            with _cut_by_interrupt(stream):
                self._generate(asked, stream)
        except ValueError as error:  # a prompt that the model cannot read
            self.say(str(error))
            return
        seconds = time.perf_counter() - start
        self.console.print()
        said = stream.text
        self.messages = [*asked, {"role": "assistant", "content": said}]
        rate = stream.tokens / seconds
        self.say(f"{stream.tokens} tokens, {rate:.1f} tokens/s" + (", cut off" if stream.cut else ""))
        if self.log is not None:
            turn = {"prompt": text, "reply": said, "plans": scales, "tokens": stream.tokens, "tokens_per_second": rate}
            self.log({**turn, "cut": stream.cut})

    def _generate(self, asked: list[dict[str, str]], stream: _Stream) -> None:
        import torch

        from ..extraction import render
        from ..extraction.capture import check_prompts
        from ..replies import encode

        chat = bool(self.tokenizer.chat_template)
        prompt: Any = asked if chat else asked[-1]["content"]
        rendered = render(
            self.tokenizer, [prompt], system=self.system if chat else None, template="chat" if chat else "plain"
        )
        check_prompts(self.model, rendered)

        def stop(ids: Any, scores: Any, **options: Any) -> Any:
            return torch.full((len(ids),), stream.cut, device=ids.device)

        with torch.no_grad():
            self.model.generate(
                **encode(self.model, rendered),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                streamer=stream,
                stopping_criteria=[stop],
            )


class _Stream:
    """Takes tokens from ``generate`` and shows the text that they make, as soon as it is whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.text = ""
        self.cut = False
        self._prompt = True

    @property
    def tokens(self) -> int:
        """How many came."""
        return len(self.ids)

    def put(self, ids: Any) -> None:
        """Tokens of the prompt first, then one after the other."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += ids.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character
            self.show(text[len(self.text) :])
            self.text = text

    def end(self) -> None:
        """The reply is over."""


@contextlib.contextmanager
def _cut_by_interrupt(stream: _Stream) -> Iterator[None]:
    """Ctrl-C ends the reply after the token that is being made, so that no forward is left half-way."""

    def cut(number: int, frame: object) -> None:
        stream.cut = True

    if threading.current_thread() is not threading.main_thread():  # which alone may watch for it
        yield
        return
    before = signal.signal(signal.SIGINT, cut)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(console: Console) -> Iterator[str]:
    """What the user types, until the end of the input."""
    while True:
        try:
            yield console.input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
