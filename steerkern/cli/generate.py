"""``steerkern generate``: replies of a model under plans, beside those of the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import BatchSize, Device, Dtype, Json, Loaded, Model, Threads, is_organism, load
from .outcome import Outcome, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..extraction import Prompt
    from ..plan import Plan


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.", show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts (.txt, .jsonl, .csv).", show_default=False)] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a plan; may be repeated.", show_default=False)
    ] = None,
    ablate: Annotated[
        str | None, typer.Option(help="Folder of directions to ablate at every layer.", show_default=False)
    ] = None,
    add: Annotated[str | None, typer.Option(help="Folder of directions to add.", show_default=False)] = None,
    layer: Annotated[
        int | None, typer.Option(help="Whose direction to take; by default each layer's own.", show_default=False)
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies what is added to each row; 1 is the plan as written.")] = 1.0,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Tokens for --ablate and --add: all, prompt, decode, or positions as -1,-2.", show_default=False
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Plans of each prompt: 'A,B,A+B,-'; - is none. By default each prompt has every plan.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system prompt before each prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Replies end there at the latest.")] = 64,
    batch_size: BatchSize = 16,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also show what the stock model says.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Outcome:
    """Print greedy replies and the session's receipt; without any plan, the stock model's replies."""
    plans = _plans(plan or [], ablate, add, layer, scale, scope)
    asked: list[Any] = list(prompt or []) + _read(prompts) or _bundled(model)
    assigned = None if rows is None else parse_rows(rows, [p.name for p in plans], len(asked))
    loaded = load(model, dtype, device, threads)
    stock, steered, receipt, backend = _ask(
        loaded, asked, plans, assigned, system, max_new_tokens, batch_size, baseline
    )
    shown = [ask if isinstance(ask, str) else ask[-1]["content"] for ask in asked]
    document: dict[str, Any] = {
        "command": "generate",
        "model": loaded.source,
        "backend": backend,
        "plans": {p.name: repr(p) for p in plans},
        "replies": [
            {
                "prompt": text,
                **({} if assigned is None else {"plans": assigned[i]}),
                **({} if stock is None else {"stock": stock[i]}),
                **({} if steered is None else {"steered": steered[i]}),
            }
            for i, text in enumerate(shown)
        ],
        "receipt": {} if receipt is None else receipt.to_json(),
    }

    def show(console: Console) -> None:
        for one in document["replies"]:
            under = f" [{' + '.join(one['plans']) or 'no plan'}]" if "plans" in one else ""
            console.print(f"> {one['prompt']}{under}", style="bold", markup=False, highlight=False)
            for who in ("stock", "steered"):
                if who in one:
                    console.print(f"  {who}: {one[who].strip()}", markup=False, highlight=False)
        console.print()
        console.print(
            f"receipt ({backend}): {receipt}" if receipt else "no plan: nothing was steered",
            markup=False,
            highlight=False,
        )

    return Outcome(document, show)


def parse_rows(text: str, names: list[str], prompts: int) -> list[list[str]]:
    """The plans of each prompt; a plan whose own name has a ``+`` in it, as that of a sum of plans, goes by that.

    Raises:
        ValueError: another number of rows than prompts, a plan that was not given, or one twice for one prompt.

    >>> parse_rows("calm,-,calm+open", ["calm", "open"], 3)
    [['calm'], [], ['calm', 'open']]
    """
    entries = [row.strip() for row in text.split(",")]
    rows = [
        [] if row == "-" else [row] if row in names else [name.strip() for name in row.split("+")] for row in entries
    ]
    if len(rows) != prompts:
        raise ValueError(f"--rows names {len(rows)} rows for {prompts} prompts")
    for name in (name for row in rows for name in row):
        if name not in names:
            raise ValueError(f"--rows: no plan {name!r}; given are {', '.join(map(repr, names)) or 'none'}")
    for entry, row in zip(entries, rows, strict=True):
        if len(set(row)) < len(row):
            raise ValueError(f"--rows: {entry!r} names a plan twice")
    return rows


def _plans(
    folders: list[str], ablate: str | None, add: str | None, layer: int | None, scale: float, scope: str | None
) -> list[Plan]:
    from ..plan import Plan

    if ablate is None and add is None and (layer is not None or scope is not None):
        raise ValueError("--layer and --scope say how to --ablate or --add; a --plan brings its own")
    plans = [Plan.from_pretrained(folder) for folder in folders]
    for kind, folder in (("ablate", ablate), ("add", add)):
        if folder is not None:
            plans.append(_direct(kind, folder, layer, "all" if scope is None else scope))
    names = [plan.name for plan in plans]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two plans are named {name!r}; save one of them under another name")
    return [plan.scaled(scale) for plan in plans] if scale != 1.0 else plans


def _direct(kind: str, folder: str, layer: int | None, scope: str) -> Plan:
    """The plan that ``--ablate`` or ``--add`` stands for: ablated at every layer, added at the direction's own."""
    from .. import edits
    from ..directions import Directions
    from ..plan import Plan

    directions = Directions.from_pretrained(folder)
    if layer is not None and layer not in directions:
        raise ValueError(f"--layer {layer}: {directions.name!r} has layers {', '.join(map(str, directions))}")
    source = directions if layer is None else directions[layer]
    edit = edits.ablate(source) if kind == "ablate" else edits.add(source)
    layers: Any = "all" if layer is None or kind == "ablate" else layer
    return Plan(edit, layers=layers, site=directions.site, scope=_scope(scope), name=kind)


def _scope(text: str) -> str | tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return text


def _read(prompts: Path | None) -> list[str]:
    from ..prompts import read_prompts

    return [] if prompts is None else read_prompts(prompts)


def _bundled(model: str | None) -> list[Any]:
    if not is_organism(model):
        raise ValueError("no prompt: give --prompt TEXT or --prompts FILE")
    from .. import organism

    return [p.messages for kind in ("harmful", "harmless") for p in organism.prompts(kind, "heldout", 2)]


def _ask(
    loaded: Loaded,
    asked: list[Prompt],
    plans: list[Plan],
    rows: list[list[str]] | None,
    system: str | None,
    max_new_tokens: int,
    batch_size: int,
    baseline: bool,
) -> tuple[list[str] | None, list[str] | None, Any, str | None]:
    """Replies of the stock model, replies under the plans, the receipt and the backend; None where not asked for."""
    from ..extraction import render
    from ..replies import replies
    from ..runtime.session import Session, steer

    template = "chat" if loaded.tokenizer.chat_template else "plain"
    rendered = render(loaded.tokenizer, asked, system=system, template=template)

    def reply(label: str, session: Session | None = None) -> list[str]:
        with progress(label, len(rendered)) as step:
            return replies(
                loaded.model,
                loaded.tokenizer,
                rendered,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                session=session,
                rows=None if session is None else rows,
                step=step,
            )

    if not plans:
        return reply("stock model"), None, None, None
    # with rows, a plan that no prompt has is no mistake
    with steer(loaded.model, plans, silent="error" if rows is None else "warn") as session:
        steered = reply("steered", session)
        receipt = session.receipt()
    return reply("stock model") if baseline else None, steered, receipt, session.backend
