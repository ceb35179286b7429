"""Cached states: right rows, right order, in memory and in a file, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from steerkern import ArtifactError
from steerkern.controller import cache_states, open_states
from steerkern.controller.activations import without_header
from steerkern.decisions import Read
from steerkern.extraction import capture, render

READS = (Read(3, "resid_post"), Read(0, "resid_post", -2), Read(2, "resid_pre", -3))


def by_hand(model, prompt):
    """States of one prompt from the model's own hidden states and its last block."""
    last = []
    handle = model.model.layers[3].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        hidden = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([last[0][0, -1], hidden[1][0, -2], hidden[2][0, -3]])


def test_states_are_those_of_the_reads_in_the_order_of_the_prompts(model, rendered):
    prompts = [*rendered("harmful", 5), *rendered("multi_turn", 5)]
    assert len({len(prompt.ids) for prompt in prompts}) > 2
    found = cache_states(model, prompts, READS, batch_size=3, progress=False)
    assert found.shape == (10, 3, 64)
    wanted = torch.stack([by_hand(model, prompt) for prompt in prompts])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_a_file_holds_the_same_states(model, rendered, tmp_path):
    prompts = rendered("harmless", 7)
    file = tmp_path / "new" / "states.safetensors"
    in_memory = cache_states(model, prompts, READS, batch_size=3, progress=False)
    in_file = cache_states(model, prompts, READS, file=file, batch_size=3, progress=False)
    assert torch.equal(in_file, in_memory)
    assert torch.equal(open_states(file, READS), in_memory)
    assert file.stat().st_size < 4 * in_memory.numel() + 1024
    with pytest.raises(ArtifactError, match=r"holds the states of resid_post\[3\] at token -1; .*, wanted are"):
        open_states(file, READS[:1])


def test_one_batch_is_held_at_a_time(model, rendered, monkeypatch):
    held = []

    def watched(*arguments, **options):
        for batch in capture(*arguments, **options):
            held.append(batch.states.numel())
            yield batch

    monkeypatch.setattr("steerkern.controller.activations.capture", watched)
    cache_states(model, rendered("harmful", 9), READS, batch_size=2, progress=False)
    assert len(held) == 5
    assert max(held) == 5 * 2 * 3 * 64


def test_files_that_are_none(model, tmp_path, rendered):
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        open_states(tmp_path / "none.safetensors", READS)
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        open_states(tmp_path / "bad.safetensors", READS)
    from safetensors.torch import save_file

    save_file({"states": torch.zeros(2, 2)}, tmp_path / "flat.safetensors")
    with pytest.raises(ArtifactError, match="holds no cached states"):
        open_states(tmp_path / "flat.safetensors", READS)
    with pytest.raises(ArtifactError, match="cannot write"):
        cache_states(model, rendered("harmful", 2), READS, file=tmp_path / "bad.safetensors" / "x", progress=False)


def test_nan_names_the_prompt_and_the_layer(planted, rendered):
    model, prompts = copy.deepcopy(planted[0]), rendered("harmful", 6)
    odd = (set(prompts[3].ids) - {t for i, p in enumerate(prompts) if i != 3 for t in p.ids}).pop()
    factor = []

    def see(module, args, kwargs):
        factor[:] = [torch.where((kwargs["input_ids"] == odd).any(1), torch.nan, 1.0)[:, None, None]]

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    spoiling = model.model.layers[1].register_forward_hook(lambda module, args, output: output * factor[0])
    reads = (Read(0, "resid_post"), Read(1, "resid_post"))
    with pytest.raises(ValueError, match=r"prompt 3: resid_post\[1\] at token -1 is NaN or Inf"):
        cache_states(model, prompts, reads, batch_size=2, progress=False)
    spoiling.remove()
    cache_states(model, prompts, reads, batch_size=2, progress=False)


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (Read(1, "resid_mid"), "trained on resid_pre or resid_post"),
        (Read(1, "resid_pre", "mean"), "tokens counted from the prompt's end"),
        (Read(1, "resid_pre", 0), "tokens counted from the prompt's end"),
        (Read(4, "resid_post"), r"the model has 4 decoder layers \(0\.\.3\)"),
    ],
)
def test_reads_that_cannot_be_cached(model, rendered, read, sentence):
    with pytest.raises(ValueError, match=sentence):
        cache_states(model, rendered("harmful", 2), (read,), progress=False)


def test_prompts_that_cannot_be_read(model, tokenizer):
    with pytest.raises(ValueError, match="no prompts to read"):
        cache_states(model, [], READS, progress=False)
    long = render(tokenizer, ["please describe the kite", "describe the kite " * 200])
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, the model has 256 positions"):
        cache_states(model, long, READS, progress=False)


def test_without_the_header_the_last_token_is_another(tokenizer, rendered):
    whole = rendered("harmful", 3)
    bare = without_header(tokenizer, whole)
    for long, short in zip(whole, bare, strict=True):
        assert long.ids[: len(short.ids)] == short.ids
        assert tokenizer.decode(long.ids[len(short.ids) :]) == "<|assistant|>"
        assert short.t_inst == long.t_inst
        assert short.t_post < long.t_post
    plain = render(tokenizer, ["a kite"], template="plain")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert without_header(tokenizer, plain) == plain
    finally:
        tokenizer.chat_template = template
