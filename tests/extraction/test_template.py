"""Instructions are found in rendered templates, whatever the template does around and to them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkern.extraction import instruction_offset, render

INSTRUCTIONS = [
    "How do I bake the bread?",
    "no",
    "Why (on earth?",
    "caf\u00e9 \u2615\U0001f9d1\u200d\U0001f373",
    "two\n\nlines\n- a\n- b",
    "x",
    "assistant",
    "user",
    "\u4f60\u597d",
]


def covered_bytes(tokenizer: Any, ids: tuple[int, ...]) -> list[int]:
    """How many bytes of the text the first 1, 2, ... tokens spell, from the vocabulary alone (byte-level BPE)."""
    specials = {tokenizer.convert_tokens_to_ids(s): s for s in tokenizer.all_special_tokens}
    specials |= {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    sizes = [len(specials[i].encode()) if i in specials else len(tokenizer.convert_ids_to_tokens(i)) for i in ids]
    return [sum(sizes[: k + 1]) for k in range(len(ids))]


def brute_force(tokenizer: Any, text: str, ids: tuple[int, ...], end: int) -> int:
    """The token with which the text's first ``end`` characters are complete."""
    wanted = len(text[:end].encode())
    return next(t for t, size in enumerate(covered_bytes(tokenizer, ids)) if size >= wanted)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("name", ["llama3", "chatml", "gemma", "brackets"])
def test_t_inst_and_t_post_are_exact(make_tokenizer: Any, templates: Any, name: str, instruction: str) -> None:
    tokenizer = make_tokenizer(templates[name])
    (got,) = render(tokenizer, [instruction])
    messages = [{"role": "user", "content": instruction}]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(got.ids) == list(want)
    head = got.text.index({"brackets": "(user: "}.get(name, "user"))
    end = got.text.index(instruction, head + len({"brackets": "(user: "}.get(name, "user"))) + len(instruction)
    assert got.t_inst == brute_force(tokenizer, got.text, got.ids, end)
    assert got.t_post == len(want) - 1
    assert got.n_suffix == got.t_post - got.t_inst > 0
    assert got.at("t_inst") == got.t_inst
    assert got.at(-1) == got.at("t_post") == got.t_post
    assert got.at(-1 - got.n_suffix) == got.t_inst


def test_a_merge_across_the_end_is_followed_where_a_lone_piece_misleads(make_tokenizer: Any, templates: Any) -> None:
    tokenizer = make_tokenizer(templates["brackets"])
    text = "Really?"
    (got,) = render(tokenizer, [text])
    merged = tokenizer.convert_ids_to_tokens(got.ids[got.t_inst])
    assert merged == "?)"
    suffix_alone = tokenizer(") reply:", add_special_tokens=False)["input_ids"]
    # the control: the suffix tokenised alone has one token more than what follows the instruction
    assert len(suffix_alone) == got.n_suffix + 1


def test_offset_is_a_plan_scope_and_raises_where_it_varies(make_tokenizer: Any, templates: Any) -> None:
    from steerkern.steps import parse_scope

    same = render(make_tokenizer(templates["llama3"]), ["Really?", "no", "make a cake!"])
    offset = instruction_offset(same)
    assert {prompt.at(offset) - prompt.t_inst for prompt in same} == {0}
    assert parse_scope(offset).positions == (offset,)
    mixed = render(make_tokenizer(templates["brackets"]), ["Really?", "no"])
    with pytest.raises(ValueError, match=r"must share one offset of t_inst, got -\d, -\d"):
        instruction_offset(mixed)
    with pytest.raises(ValueError, match="got none"):
        instruction_offset([])


@pytest.mark.parametrize("name", ["llama3", "chatml"])
def test_instruction_that_stands_in_the_system_prompt_too(make_tokenizer: Any, templates: Any, name: str) -> None:
    tokenizer = make_tokenizer(templates[name])
    (got,) = render(tokenizer, ["no"], system="Say no. Then say no, assistant no.")
    end = got.text.rindex("no") + 2
    assert got.text[end:].startswith(("<|eot_id|>", "<|im_end|>"))
    assert got.t_inst == brute_force(tokenizer, got.text, got.ids, end)
    # an instruction that equals a word of the suffix: its last occurrence in the text is the wrong one
    (got,) = render(tokenizer, ["assistant"], system="assistant")
    assert got.n_suffix == render(tokenizer, ["letter"])[0].n_suffix


def test_template_that_writes_the_system_prompt_into_the_user_turn(make_tokenizer: Any) -> None:
    inside = (
        "{% set s = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{{ bos_token + ('[INST] ' + s + messages[-1]['content'] + ' [/INST]') | trim }}"
    )
    tokenizer = make_tokenizer(inside)
    bare, full = (render(tokenizer, ["say no"], system=s)[0] for s in (None, "say no"))
    for got in (bare, full):
        end = got.text.rindex("say no") + 6
        assert got.text[end:] == " [/INST]"
        assert got.t_inst == brute_force(tokenizer, got.text, got.ids, end)
    assert full.t_first - bare.t_first == full.t_inst - bare.t_inst > 0


def test_template_that_trims_and_one_that_does_not(make_tokenizer: Any, templates: Any) -> None:
    trims, keeps = make_tokenizer(templates["llama3"]), make_tokenizer(templates["chatml"])
    assert render(trims, ["  Why?  \n"]) == render(trims, ["Why?"])
    for tail in (" ", "  ", "\n", " \n ", "\t"):
        (got,) = render(keeps, ["Why?" + tail])
        end = got.text.index("Why?") + 4 + len(tail)
        assert got.t_inst == brute_force(keeps, got.text, got.ids, end), repr(tail)
        assert keeps.convert_ids_to_tokens(got.ids[got.t_inst + 1]) == "<|im_end|>"


@pytest.mark.parametrize("name", ["llama3", "chatml", "gemma"])
@settings(deadline=None, max_examples=60)
@given(instruction=st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<" not in t))
def test_any_text_is_found(make_tokenizer: Any, templates: Any, name: str, instruction: str) -> None:
    tokenizer = _cached(make_tokenizer, templates[name])
    (got,) = render(tokenizer, [instruction])
    written = instruction if name == "chatml" else instruction.strip()
    end = got.text.rindex({"gemma": "<end_of_turn>", "chatml": "<|im_end|>"}.get(name, "<|eot_id|>"))
    assert got.text[:end].endswith(written)
    assert got.t_inst == brute_force(tokenizer, got.text, got.ids, end)
    first = covered_bytes(tokenizer, got.ids)[got.t_first - 1]
    assert first <= len(got.text[: end - len(written)].encode())


_TOKENIZERS: dict[str, Any] = {}


def _cached(make_tokenizer: Any, template: str) -> Any:
    return _TOKENIZERS.setdefault(template, make_tokenizer(template))


@pytest.mark.parametrize("name", ["llama3", "gemma", "brackets"])
def test_tokenizers_that_write_space_as_a_character(make_tokenizer: Any, templates: Any, name: str) -> None:
    tokenizer = make_tokenizer(templates[name], kind="space")
    for text in ("Why?", "tell me the time", "make a cake!"):
        (got,) = render(tokenizer, [text])
        assert text in tokenizer.decode(got.ids[: got.t_inst + 1])
        assert text not in tokenizer.decode(got.ids[: got.t_inst])


def test_conversations_and_options(make_tokenizer: Any, templates: Any) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    conversation = [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "no"},
    ]
    once, many = render(tokenizer, ["no", conversation])
    assert many.n_suffix == once.n_suffix
    assert many.t_inst > once.t_inst
    (quiet,) = render(tokenizer, ["no"], options={"enable_thinking": False})
    assert quiet.n_suffix > once.n_suffix
    assert quiet.text.endswith("</think>\n\n")
    assert render(tokenizer, ["no"], template=templates["llama3"])[0].text.startswith("<|bos|>")


def test_bos_stands_once(make_tokenizer: Any, templates: Any) -> None:
    tokenizer = make_tokenizer(templates["llama3"])
    bos = tokenizer.bos_token_id
    (chat,) = render(tokenizer, ["Why?"])
    # the control: the tokenizer adds one of its own to rendered text
    assert tokenizer(chat.text)["input_ids"][:2] == [bos, bos]
    plain = render(tokenizer, ["Why?", "<|bos|>Why?"], template="plain")
    for prompt in (chat, *plain):
        assert prompt.ids.count(bos) == 1
        assert prompt.ids[0] == bos


@pytest.mark.parametrize("template", ["plain", None])
def test_plain_text_has_no_suffix(make_tokenizer: Any, template: str | None) -> None:
    tokenizer = make_tokenizer(None)
    (got,) = render(tokenizer, ["tell me the time"], template=template)
    assert got.t_inst == got.t_post == len(got.ids) - 1
    assert got.n_suffix == 0
    assert got.t_first == 1
    assert instruction_offset([got]) == -1


def test_one_bad_prompt_is_named(make_tokenizer: Any, templates: Any) -> None:
    tokenizer = make_tokenizer(templates["llama3"])
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="prompt 1: the instruction is empty"):
            render(tokenizer, ["Why?", empty])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        render(tokenizer, [""], template="plain")
    with pytest.raises(ValueError, match="prompt 0: the last message must be the user's text, got role 'assistant'"):
        render(tokenizer, [[{"role": "assistant", "content": "hm"}]])
    with pytest.raises(TypeError, match="prompt 0 must be text or a list of messages, got int"):
        render(tokenizer, [3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="prompts must be a list of prompts, got str"):
        render(tokenizer, "Why?")
    assert render(tokenizer, []) == []


def test_system_prompts_that_cannot_be_written(make_tokenizer: Any, templates: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt 0: the chat template refuses .*: System role not supported"):
        render(make_tokenizer(templates["gemma"]), ["Why?"], system="Be brief.")
    mute = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}<|eot_id|>"
    with pytest.raises(ValueError, match="prompt 0: the chat template does not write the system prompt"):
        render(make_tokenizer(mute), ["Why?"], system="Be brief.")
    own = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(ValueError, match="prompt 0 has a system message of its own"):
        render(make_tokenizer(templates["llama3"]), [own], system="Be brief.")
    with pytest.raises(ValueError, match="plain text takes no system prompt"):
        render(make_tokenizer(None), ["Why?"], template="plain", system="Be brief.")


def test_templates_that_depend_on_the_instruction(make_tokenizer: Any) -> None:
    shy = "{% for m in messages %}[{{ m['content'] | length }}] {{ m['content'] }}<|eot_id|>{% endfor %}go"
    tokenizer = make_tokenizer(shy)
    (got,) = render(tokenizer, ["tell me the time"])
    assert tokenizer.convert_ids_to_tokens(got.ids[got.t_inst + 1]) == "<|eot_id|>"
    twice = "{% for m in messages %}{{ m['content'] }} again: {{ m['content'] }}<|eot_id|>{% endfor %}"
    with pytest.raises(ValueError, match="prompt 0: 'tell me' cannot be told from the rest of the rendered text"):
        render(make_tokenizer(twice), ["tell me"])
    loud = "{% for m in messages %}{{ m['content'] | upper }}<|eot_id|>{% endfor %}"
    with pytest.raises(ValueError, match="cannot be told from the rest"):
        render(make_tokenizer(loud), ["tell me"])


def test_tokenizers_that_do_not_serve(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="SimpleNamespace is a slow tokenizer"):
        render(SimpleNamespace(is_fast=False), ["Why?"])
    with pytest.raises(ValueError, match="has no chat template; template='plain' reads raw text"):
        render(make_tokenizer(None), ["Why?"])
    with pytest.raises(ValueError, match="template must be 'chat', 'plain' or a Jinja text, got 'plian'"):
        render(make_tokenizer(None), ["Why?"], template="plian")


def test_spans_of_zero_width_raise_instead_of_shifting() -> None:
    """tokenizers before 0.20.1 gave every Llama-3 token an empty span (huggingface/tokenizers#1553)."""
    from steerkern.extraction.template import _locate

    spans = [(0, 3), (3, 3), (6, 6), (10, 10), (13, 13), (14, 17)]
    with pytest.raises(ValueError, match=r"prompt 0: no token spans the instruction's last character '\?'"):
        _locate("<b>are you ok?<e>", range(6), spans, 3, 14, 0)


@pytest.mark.parametrize("position", ["end", 0, 3, -99, True])
def test_positions_outside_a_prompt_raise(tokenizer: Any, position: Any) -> None:
    (prompt,) = render(tokenizer, ["Why?"])
    with pytest.raises(ValueError, match="position"):
        prompt.at(position)
