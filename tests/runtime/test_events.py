"""Event scopes: after and until a token sequence, the first n tokens, every n-th; against a loop over single tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

import steerkern as sk
from steerkern.runtime.batch import Batch
from steerkern.runtime.events import Events
from steerkern.runtime.prompts import Prompts
from steerkern.steps import Tokens
from tests.runtime.models import LAYERS, VOCABULARY, tiny_llama
from tests.runtime.test_generate import GREEDY, LAYER, NEW, STRENGTH, padded


def selected(tokens: Tokens, ids: list[int], prompt: int) -> list[bool]:
    """Which tokens of one unpadded sequence a scope means, one token at a time, straight from its description."""
    begins = {"all": 0, "prompt": 0, "decode": prompt, "reply": prompt - 1}[tokens.phase]
    ends = {"prompt": prompt}.get(tokens.phase, len(ids))
    opened: int | None = None  # position after the last occurrence of `after`
    stopped = False
    chosen = []
    for p in range(len(ids)):
        origin = opened if tokens.after is not None else begins
        live = not stopped and (tokens.after is None or opened is not None)
        inside = begins <= p < ends and p >= tokens.start and (tokens.stop is None or p < tokens.stop)
        count = p - origin if origin is not None else 0
        chosen.append(live and inside and (tokens.first is None or count < tokens.first) and count % tokens.every == 0)
        seen = ids[: p + 1]
        if any(seen[-len(s) :] == list(s) for s in tokens.until or ()):
            stopped, opened = True, None
        if any(seen[-len(s) :] == list(s) for s in tokens.after or ()):
            stopped, opened = False, p + 1
    return chosen


SCOPES = st.builds(
    Tokens,
    phase=st.sampled_from(["all", "prompt", "decode", "reply"]),
    start=st.integers(0, 3),
    after=st.sampled_from([None, ((1,),), ((1, 2),), ((1,), (2, 2))]),
    until=st.sampled_from([None, ((0,),), ((2, 0),)]),
    first=st.sampled_from([None, 1, 3]),
    every=st.sampled_from([1, 2, 3]),
)


@settings(max_examples=300, deadline=None)
@given(
    scope=SCOPES,
    rows=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 2), min_size=12, max_size=12)), min_size=1, max_size=3
    ),
    left=st.booleans(),
    cuts=st.lists(st.integers(1, 11), max_size=3),
)
@example(  # the marker's tokens lie on both sides of the padding between prompt and reply
    scope=Tokens(after=((1, 2),)), rows=[(2, [0, 1, 2, *[0] * 9]), (3, [0] * 12)], left=False, cuts=[]
)
def test_a_scope_means_the_tokens_that_its_description_says(
    scope: Tokens, rows: list[tuple[int, list[int]]], left: bool, cuts: list[int]
) -> None:
    """Also padded on either side, and fed in chunks."""
    length, new = max(size for size, _ in rows), 6
    columns = length + new
    ids = np.full((len(rows), columns), 1)  # padding holds a marker's token, and must not count
    mask = torch.zeros(len(rows), length)
    for row, (size, tokens) in enumerate(rows):
        at = length - size if left else 0
        mask[row, at : at + size] = 1
        ids[row, at : at + size] = tokens[:size]
        ids[row, length:] = tokens[size : size + new]
    prompts = Prompts.of(len(rows), length, mask)
    batch = Batch.__new__(Batch)
    batch.prompts, batch.events = prompts, Events(scope.markers)
    edges = [0, *sorted({cut for cut in cuts if cut < columns}), columns]
    parts = []
    for first, last in itertools.pairwise(edges):
        batch.see(first, ids[:, first:last])
        parts.append(prompts.select(scope, np.arange(first, last), batch.events))
    found = np.concatenate(parts, 1)
    for row, (size, tokens) in enumerate(rows):
        at = length - size if left else 0
        mine = [*found[row, at : at + size], *found[row, length:]]
        assert mine == selected(scope, tokens[: size + new], size)
        assert found[row].sum() == sum(mine), "padding was selected"


def test_tokens_that_are_run_again_replace_the_old_ones() -> None:
    """A cache that is cropped, as assisted decoding does it."""
    events = Events((((7,),),))
    scope = Tokens("all", after=(7,))
    events.see(0, np.array([[1, 7, 1, 1]]))
    assert events.live(scope, np.arange(4), 1)[0].tolist() == [[False, False, True, True]]
    events.see(1, np.array([[1, 7]]))
    assert events.live(scope, np.arange(4), 1)[0].tolist() == [[False, False, False, True]]


def replies(model: LlamaForCausalLM, prompt: Tensor, vector: Tensor, scope: Tokens) -> list[int]:
    """A greedy reply, recomputed in full at every step, with the scope worked out anew each time."""
    ids = prompt[None]
    for _ in range(NEW):
        chosen = torch.tensor(selected(scope, ids[0].tolist(), len(prompt)))
        handle = model.model.layers[LAYER].register_forward_pre_hook(
            lambda block, args, chosen=chosen: (args[0] + STRENGTH * vector * chosen[None, :, None], *args[1:])
        )
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        handle.remove()
    return ids[0, len(prompt) :].tolist()


def scopes_of(reply: list[int], prompt: list[int]) -> dict[str, Tokens]:
    return {
        "after a generated token": Tokens(after=(reply[1],)),
        "after two": Tokens("decode", after=(reply[0], reply[1])),
        "after a prompt token": Tokens("decode", after=(prompt[-2],), first=3),
        "until": Tokens("all", until=(reply[2],)),
        "first": Tokens("decode", first=2),
        "every": Tokens("decode", every=3),
        "reply": Tokens("reply"),
        "first of the reply": Tokens("reply", first=1),
    }


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", scopes_of([0, 0, 0], [0, 0]))
def test_generate_follows_events_in_every_row(model: LlamaForCausalLM, vector: Tensor, name: str, cache: str) -> None:
    ids, mask = padded("left")
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    plain = model.generate(ids[1:2], attention_mask=mask[1:2], **GREEDY)[0, 9:].tolist()
    scope = scopes_of(plain, ids[1].tolist())[name]
    with sk.steer(model, sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=scope, name="p"), silent="ignore"):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    for row in range(3):
        assert out[row, 9:].tolist() == replies(model, ids[row][mask[row] == 1], vector, scope), f"row {row}"


def test_events_follow_the_beams(model: LlamaForCausalLM, vector: Tensor) -> None:
    """Beams change places between steps: each is judged by the tokens that it holds now."""
    ids, mask = padded("left")
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    plain = model.generate(ids, attention_mask=mask, **beams)[:, 9:]
    scope = Tokens("decode", after=(int(plain[0, 1]),))
    plan = sk.Plan(sk.add(vector, STRENGTH), layers=[LAYER], scope=scope, name="p")
    with sk.steer(model, plan, silent="ignore"):
        cached = model.generate(ids, attention_mask=mask, **beams)
        anew = model.generate(ids, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached[:, 9:], plain)


def test_a_marker_token_that_the_model_does_not_have_raises(model: LlamaForCausalLM, vector: Tensor) -> None:
    plan = sk.Plan(sk.add(vector), scope=Tokens(after=(VOCABULARY,)), name="p")
    with pytest.raises(sk.PlanError, match=f"plan 'p'.* token {VOCABULARY}, the model knows 0..{VOCABULARY - 1}"):
        sk.steer(model, plan)


@pytest.mark.parametrize("change", [{"after": ()}, {"until": ((),)}, {"first": 0}, {"every": 0}, {"after": (-1,)}])
def test_bad_events_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        Tokens(**change)  # type: ignore[arg-type]


def test_markers_of_the_organism_are_its_tokens() -> None:
    from steerkern import organism

    _, tokenizer = organism.load()
    close = sk.marker(tokenizer, "</think>")
    assert close == ((tokenizer.convert_tokens_to_ids("</think>"),),)
    several = sk.marker(tokenizer, " harmful")
    text = "this request is harmful"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any(tuple(ids[i : i + len(s)]) == s for s in several for i in range(len(ids)))
    with pytest.raises(sk.PlanError, match="a marker needs a text"):
        sk.marker(tokenizer, "")


def test_plans_with_events_come_back_from_a_folder(tmp_path: object, vector: Tensor) -> None:
    scope = Tokens("decode", after=((1, 2), (3,)), until=(4,), first=5, every=2)
    sk.Plan(sk.add(vector), scope=scope, name="p").save_pretrained(str(tmp_path))
    assert sk.Plan.from_pretrained(str(tmp_path)).steps[0].tokens == scope


def test_two_models_do_not_share_events(vector: Tensor) -> None:
    one, two = tiny_llama(0), tiny_llama(1)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
    scope = Tokens("decode", after=(int(ids[0, 2]),))
    plan = sk.Plan(sk.add(vector, STRENGTH), layers=[min(LAYER, LAYERS - 1)], scope=scope, name="p")
    stock = two.generate(ids, **GREEDY)
    with sk.steer(one, plan):
        one.generate(ids, **GREEDY)
        assert torch.equal(two.generate(ids, **GREEDY), stock)
