from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import steerkern as sk
from tests.runtime.models import WIDTH

LAYER = 2


def states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.model.layers[LAYER].register_forward_pre_hook(lambda block, args: kept.append(args[0].clone()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("fuse", ["all", "none"])
def test_probes_read_the_row_as_it_arrived(
    model: LlamaForCausalLM, ids: Tensor, vector: Tensor, backend: str, fuse: str
) -> None:
    plain = states(model, ids)
    axes = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(1)))[0].T
    watch = sk.Plan([sk.add(vector, 2.0), sk.probe(axes)], layers=[LAYER], name="watch")
    with sk.steer(model, watch, backend=backend, fuse=fuse) as session, torch.no_grad():
        model(ids)
        read = session.readings("watch")
    assert list(read) == [sk.Site(LAYER, "resid_pre")]
    torch.testing.assert_close(read[sk.Site(LAYER, "resid_pre")], plain @ axes.T, atol=1e-4, rtol=1e-4)


def test_readings_follow_a_reply_token_by_token(model: LlamaForCausalLM, ids: Tensor, vector: Tensor) -> None:
    late = sk.Plan(sk.probe(vector), layers=[LAYER], scope="decode", name="late")
    push = sk.Plan(sk.add(vector, 1.0), layers=[1], name="push")
    with sk.steer(model, [push, late]) as session:
        session.rows([["push", "late"], "push", "late"])
        out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        read = session.readings("late")[sk.Site(LAYER, "resid_pre")]
    # the prompt and row 1 are outside the scope; decode steps are read one by one
    assert read.shape == (3, 4, 1)
    assert read[1].isnan().all()
    with sk.steer(model, push):
        expected = states(model, out[:, :-1]) @ vector
    torch.testing.assert_close(read[0, :, 0], expected[0, 9:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(read[2, :, 0], (states(model, out[:, :-1]) @ vector)[2, 9:], atol=1e-3, rtol=1e-3)


def test_a_plan_without_a_probe_has_no_readings(model: LlamaForCausalLM, vector: Tensor) -> None:
    with sk.steer(model, sk.Plan(sk.add(vector), name="push"), silent="ignore") as session:
        with pytest.raises(sk.PlanError, match="plan 'push' has no probe to read"):
            session.readings("push")
        with pytest.raises(sk.PlanError, match="no plan 'pull' in this session"):
            session.readings("pull")
