from __future__ import annotations

import pytest
import torch

from steerkern import Plan, PlanError, ablate, organism, steer
from steerkern.extraction import extract, render
from steerkern.replies import encode, pad_token, replies


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject():
    model, tokenizer = organism.load()
    sides = [[p.messages for p in organism.prompts(kind, "train", 48)] for kind in ("harmful", "harmless")]
    directions = extract(model, tokenizer, *sides, progress=False)
    asked = [p for kind in ("harmful", "harmless") for p in organism.prompts(kind, "heldout", 5)]
    return model, tokenizer, directions, asked, render(tokenizer, [p.messages for p in asked])


def test_batches_do_not_change_replies(subject):
    model, tokenizer, _, asked, rendered = subject
    done = []
    texts = replies(model, tokenizer, rendered, max_new_tokens=16, batch_size=3, step=done.append)
    assert texts == replies(model, tokenizer, rendered, max_new_tokens=16, batch_size=64)
    assert [text.strip() for text in texts] == [prompt.reply for prompt in asked]
    assert done == [3, 3, 3, 1]


def test_each_row_has_its_own_plan(subject):
    model, tokenizer, directions, _, rendered = subject
    stock = replies(model, tokenizer, rendered, max_new_tokens=16)
    with steer(model, Plan(ablate(directions[2].unit), name="open")) as session:
        rows = ["open" if i % 2 == 0 else None for i in range(10)]
        mixed = replies(model, tokenizer, rendered, max_new_tokens=16, batch_size=4, session=session, rows=rows)
        steered = replies(model, tokenizer, rendered, max_new_tokens=16)
    assert mixed[1::2] == stock[1::2]
    assert mixed[::2] == steered[::2]
    assert mixed[0] != stock[0]


def test_bad_rows_and_prompts(subject):
    model, tokenizer, directions, _, rendered = subject
    with pytest.raises(ValueError, match="rows need a session and one entry per prompt, got 1 for 10 prompts"):
        replies(model, tokenizer, rendered, max_new_tokens=4, rows=[None])
    with pytest.raises(ValueError, match="at least 1"):
        replies(model, tokenizer, rendered, max_new_tokens=0)
    with pytest.raises(ValueError, match="no prompts"):
        replies(model, tokenizer, [], max_new_tokens=4)
    session = steer(model, Plan(ablate(directions[2].unit), name="open"))
    try:
        with pytest.raises(PlanError, match="no plan 'other'"):
            replies(model, tokenizer, rendered, max_new_tokens=4, session=session, rows=["other"] * 10)
    finally:
        session.detach()


def test_encode_pads_on_the_left(subject):
    model, _, _, _, rendered = subject
    inputs = encode(model, rendered)
    for prompt, ids, mask in zip(
        rendered, inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        padding = len(ids) - len(prompt.ids)
        assert ids == [pad_token(model)] * padding + list(prompt.ids)
        assert mask == [0] * padding + [1] * len(prompt.ids)
