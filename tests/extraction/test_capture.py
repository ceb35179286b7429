"""States are those of a direct forward, whatever the batch, the padding, the order and the session around it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkern as sk
from steerkern.extraction import Rendered, capture, render, states
from steerkern.extraction.capture import pad
from steerkern.runtime.decoder import find_decoder

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "opt", "gpt_neox", "bloom"]


def direct(model: Any, prompt: Rendered) -> Tensor:
    """``[L+1, S, H]`` of one unpadded prompt from ``output_hidden_states`` and a hook for the raw last state."""
    decoder, blocks = find_decoder(model)
    raw: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda m, a, out: raw.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    handle.remove()
    # the trap: the last entry of hidden_states is the final-normed state
    assert not torch.allclose(hidden[-1], raw[0])
    return torch.cat([*hidden[:-1], raw[0]])


def rendered_of(tokenizer: Any, prompts: list[str]) -> list[Rendered]:
    made = render(tokenizer, prompts)
    assert len({len(p.ids) for p in made}) > 3
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_a_direct_forward(make_model: Any, tokenizer: Any, prompts: list[str], family: str) -> None:
    model = make_model(family, dtype=torch.float64)
    read = rendered_of(tokenizer, prompts)
    got = states(model, read, ("t_inst", "t_post", -2), batch_size=4, progress=False)
    assert got.shape == (len(read), 4, 3, 32)
    for i, prompt in enumerate(read):
        want = direct(model, prompt)[:, [prompt.t_inst, prompt.t_post, prompt.t_post - 1]]
        torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_padding_do_not_show(make_model: Any, tokenizer: Any, prompts: list[str], family: str) -> None:
    model = make_model(family)
    read = rendered_of(tokenizer, prompts)
    one = states(model, read, ("t_inst", "t_post"), batch_size=1, progress=False)
    seven = states(model, read, ("t_inst", "t_post"), batch_size=7, progress=False)
    scale = one.abs().amax()
    # float32: another width is another order of the sums in attention and in matrix products
    assert float((one - seven).abs().amax() / scale) < 1e-6


def left(read: list[Rendered]) -> tuple[Tensor, Tensor]:
    """Ids and mask padded on the left, as tokenizers and ``generate`` do."""
    ids, mask = pad([p.ids[::-1] for p in read])
    return ids.flip(1), mask.flip(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_those_of_left_padding(make_model: Any, tokenizer: Any, prompts: list[str], family: str) -> None:
    model = make_model(family)
    read = rendered_of(tokenizer, prompts)
    ids, mask = left(read)
    decoder, _ = find_decoder(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    if family != "bloom":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        want = torch.stack([h[:, -1] for h in decoder(**inputs).hidden_states[:-1]], 1)
    got = states(model, read, progress=False)[:, :-1, 0]
    assert float((got - want).abs().amax() / want.abs().amax()) < 1e-6


def test_padding_on_the_left_shows(make_model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """The control: padding on the left without positions shifts learned ones."""
    read = rendered_of(tokenizer, prompts)
    ids, mask = left(read)
    shorter = [i for i, p in enumerate(read) if len(p.ids) < ids.shape[1]]
    model = make_model("gpt2", dtype=torch.float64)
    with torch.no_grad():
        naive = model.transformer(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1][:, -1]
    ours = states(model, read, progress=False)[:, 1, 0]
    assert float((naive - ours)[shorter].abs().amax(1).min()) > 1e-3
    # eager attention in float64 makes NaN of rows that are masked whole, which padding on the right does not have
    model = make_model("gemma2", dtype=torch.float64)
    assert bool(states(model, read, progress=False).isfinite().all())


def test_order_of_prompts_is_kept(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    read = rendered_of(tokenizer, prompts)
    got = states(model, read, batch_size=4, progress=False)
    back = states(model, read[::-1], batch_size=4, progress=False).flip(0)
    assert float((got - back).abs().amax()) < 1e-5
    single = states(model, read[3:4], progress=False)
    torch.testing.assert_close(got[3:4], single, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, states(model, read, batch_size=4, progress=False))


def test_longest_prompts_come_first_and_each_once(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    read = rendered_of(tokenizer, prompts)
    batches = list(capture(model, read, batch_size=4, progress=False))
    lengths = [len(read[i].ids) for batch in batches for i in batch.prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(read)))
    assert [len(batch.prompts) for batch in batches] == [4, 4, 1]


def full_states(shape: tuple[int, ...]) -> int:
    """Live tensors of a whole batch's state, in any view."""
    return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) == shape)


@pytest.mark.parametrize("layers", [4, 12])
def test_only_the_chosen_rows_are_retained(make_model: Any, tokenizer: Any, prompts: list[str], layers: int) -> None:
    model = make_model(layers=layers)
    read = rendered_of(tokenizer, prompts)
    shape = (len(read), max(len(p.ids) for p in read), 32)
    _, blocks = find_decoder(model)
    seen: list[int] = []
    held: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda *_: seen.append(full_states(shape)))
    (batch,) = capture(model, read, ("t_inst", "t_post"), batch_size=16, progress=False)
    assert batch.states.untyped_storage().nbytes() == (layers + 1) * len(read) * 2 * 32 * 4
    # the last block's input, output and what its forward still names; not one per layer
    assert seen[0] <= 4
    # the control: a hook that keeps whole states is seen
    keep = [block.register_forward_pre_hook(lambda m, args: held.append(args[0])) for block in blocks]
    list(capture(model, read, batch_size=16, progress=False))
    assert seen[1] >= layers
    for h in (handle, *keep):
        h.remove()


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    read = render(tokenizer, ["Why?", "no", "make a cake!"])
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    for _ in capture(model, read, batch_size=2, progress=False):
        assert hooks_of(model) == 0
        assert [m.training for m in model.modules()] == modes
        break  # an abandoned stream leaves nothing behind
    model.model.norm.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(capture(model, read, progress=False))
    assert hooks_of(model) == 1
    assert [m.training for m in model.modules()] == modes


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_dropout_is_off(make_model: Any, tokenizer: Any) -> None:
    model = make_model("gpt2").train()
    read = render(tokenizer, ["Why?"])
    assert torch.equal(states(model, read, progress=False), states(model, read, progress=False))


def test_the_head_is_not_computed(model: Any, tokenizer: Any) -> None:
    model.lm_head.register_forward_hook(_fail)
    states(model, render(tokenizer, ["Why?"]), progress=False)


@pytest.mark.parametrize("fuse", ["all", "none"])
def test_a_steered_model_is_read_steered(model: Any, tokenizer: Any, prompts: list[str], fuse: Any) -> None:
    read = rendered_of(tokenizer, prompts)
    plain = states(model, read, ("t_inst", "t_post"), batch_size=4, progress=False)
    torch.manual_seed(1)
    vector = torch.randn(32)
    plan = sk.Plan(sk.add(vector), layers=1, scope=-1)
    with sk.steer(model, plan, backend="reference", fuse=fuse) as session:
        steered = states(model, read, ("t_inst", "t_post"), batch_size=4, progress=False)
        # tables that grew while reading must still be writable
        ids, mask = left(read)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert session.receipt().plans["plan"].tokens == 2 * len(read)
    moved = (steered - plain).abs().amax(-1)  # [N, L+1, P]
    assert float(moved[:, :, 0].max()) < 1e-4, "t_inst lies before the steered token"
    assert float(moved[:, 0].max()) < 1e-4
    assert float(moved[:, 2:, 1].min()) > 1e-2
    torch.testing.assert_close(states(model, read, ("t_inst", "t_post"), batch_size=4, progress=False), plain)
    # resid_pre[1] itself: before the edit at a fused site, after it at the block's door
    there = (steered - plain)[:, 1, 1]
    want = torch.zeros_like(there) if fuse == "all" else vector.expand_as(there)
    torch.testing.assert_close(there, want, rtol=0, atol=1e-4)


def test_half_types_stay_as_they_are(make_model: Any, tokenizer: Any) -> None:
    model = make_model(dtype=torch.bfloat16)
    assert states(model, render(tokenizer, ["Why?"]), progress=False).dtype == torch.bfloat16


def test_what_cannot_be_read_raises_before_the_run(make_model: Any, tokenizer: Any) -> None:
    model = make_model()
    model.model.register_forward_pre_hook(_fail)
    read = render(tokenizer, ["Why?"])
    ids = read[0].ids
    long = Rendered("", (5,) * 129, 0, 128)
    with pytest.raises(ValueError, match="prompt 1 has 129 tokens, the model has 128 positions"):
        capture(model, [*read, long])
    with pytest.raises(ValueError, match=r"prompt 0 has token 512, the model knows 0..511: is this its tokenizer\?"):
        capture(model, [Rendered("", (512,), 0, 0)])
    with pytest.raises(ValueError, match="no prompts to read"):
        capture(model, [])
    with pytest.raises(ValueError, match="positions must be a list"):
        capture(model, read, "t_post")
    with pytest.raises(ValueError, match=f"position -99: the prompt has {len(ids)} tokens"):
        capture(model, read, (-99,))
    with pytest.raises(ValueError, match="batch_size must be a number from 1, got 0"):
        capture(model, read, batch_size=0)


def test_no_bar_where_there_is_no_terminal(model: Any, tokenizer: Any, capfd: Any) -> None:
    states(model, render(tokenizer, ["Why?"]), progress=True)
    assert capfd.readouterr() == ("", "")
