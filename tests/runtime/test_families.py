"""Every family: the edit at each site equals a plain forward hook, on every backend and way of fusing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import steerkern as sk
from steerkern.runtime.sites import Anatomy, examine
from tests.runtime.families import FAMILIES, REFUSED, VOCABULARY, WIDTH, Family, build

Change = Callable[[Tensor], Tensor]
NEW_TOKENS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    return build(family)


@pytest.fixture(scope="module")
def anatomy(model: nn.Module) -> Anatomy:
    return examine(model)


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


def direction(seed: int) -> Tensor:
    return nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.clone()


def greedy(model: nn.Module, ids: Tensor) -> list[list[int]]:
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return out[:, ids.shape[1] :].tolist()


@contextlib.contextmanager
def hooked(anatomy: Anatomy, changes: dict[sk.Site, Change]) -> Iterator[None]:
    """Steering by forward hooks: a new state for a block's input or output; for a second norm, its input in place."""
    doors = {found.site: found.door for found in anatomy.sites}
    handles = []

    def entering(change: Change) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return hook

    def leaving(change: Change) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
            return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

        return hook

    def inside(change: Change) -> Callable[..., None]:
        # the block goes on with the tensor that it gave to its norm
        def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].copy_(change(args[0]))

        return hook

    for site, change in changes.items():
        if site.name == "resid_mid":
            handles.append(doors[site].register_forward_pre_hook(inside(change)))
        elif site.name == "resid_post":
            handles.append(doors[site].register_forward_hook(leaving(change)))
        else:
            handles.append(doors[site].register_forward_pre_hook(entering(change), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(vector: Tensor, coefficient: float) -> Change:
    # half types: the sum in fp32 and one rounding, as the reference does it
    return lambda h: (h.float() + coefficient * vector).to(h.dtype)


def ablated(unit: Tensor) -> Change:
    def change(h: Tensor) -> Tensor:
        rows = h.float()
        return (rows - (rows * unit).sum(-1, keepdim=True) * unit).to(h.dtype)

    return change


def steering(anatomy: Anatomy, kind: str) -> tuple[sk.Plan, dict[sk.Site, Change]]:
    """A plan for the first block, a middle one and the last one's output, and the same as changes of a state."""
    last = len(anatomy.blocks) - 1
    inner, outer = direction(1), direction(2)
    if kind == "add":
        plan = sk.Plan(sk.add(3.0 * inner), layers=[0, 1, last], name="p")
        end = sk.Plan(sk.add(2.0 * outer), layers=last, site="resid_post", name="p")
        changes = added(3.0 * inner, 1.0), added(2.0 * outer, 1.0)
    else:
        plan = sk.Plan(sk.ablate(inner), layers=[0, 1, last], name="p")
        end = sk.Plan(sk.ablate(outer), layers=last, site="resid_post", name="p")
        changes = tuple(ablated(step.edits[0].rows[None].vectors[0]) for step in (*plan.steps, *end.steps))
    where = {sk.Site(layer, "resid_pre"): changes[0] for layer in (0, 1, last)}
    return plan + end, {**where, sk.Site(last, "resid_post"): changes[1]}


def check(family: Family, backend: str, found: Tensor, expected: Tensor) -> None:
    if backend == "reference":
        assert torch.equal(found, expected)
    elif family.dtype == torch.float32:
        # sums of a norm in another order: relative 2e-7 each, which a few layers of random weights amplify
        torch.testing.assert_close(found, expected, atol=5e-5 * float(expected.abs().max()), rtol=0.0)
    else:
        # one bf16 ulp (4e-3) somewhere, amplified in the same way
        torch.testing.assert_close(found, expected, atol=0.1 * float(expected.abs().max()), rtol=0.0)


def test_sites_are_where_the_table_says(family: Family, anatomy: Anatomy) -> None:
    residual = [found for found in anatomy.sites if found.site.name != "resid_mid"]
    mid = {found.site.layer: "d" if found.fused is None else "F" for found in anatomy.sites if found not in residual}
    assert "".join("d" if found.fused is None else "F" for found in residual) == family.fused
    assert "".join(mid.get(layer, "-") for layer in range(len(anatomy.blocks))) == family.mid
    assert all(found.reason for found in anatomy.sites if found.fused is None)


def test_the_shortcut_changes_nothing_in_the_report(model: nn.Module, anatomy: Anatomy) -> None:
    names = {module: name for name, module in model.named_modules()}

    def report(a: Anatomy) -> object:
        sites = [(f.site, names[f.door], f.fused and names[f.fused.module], f.reason, f.streams) for f in a.sites]
        norms = {(names[n.module], n.norm, n.eps, n.width, n.dtype) for n in a.norms}
        return sites, norms, a.fingerprint, a.device, a.dtype, names[a.decoder]

    assert report(anatomy) == report(examine(model, shortcut=False))


@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_every_way_of_steering_equals_a_plain_hook(
    family: Family, model: nn.Module, anatomy: Anatomy, prompts: Tensor, kind: str
) -> None:
    plan, changes = steering(anatomy, kind)
    plain = logits(model, prompts)
    with hooked(anatomy, changes):
        expected, tokens = logits(model, prompts), greedy(model, prompts)
    assert float((expected - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    for backend in ("reference", "cpu"):
        for fuse in ("all", "sites", "none"):
            with sk.steer(model, plan, backend=backend, fuse=fuse) as session:
                check(family, backend, logits(model, prompts), expected)
                if fuse == "all" and (family.dtype == torch.float32 or backend == "reference"):
                    assert greedy(model, prompts) == tokens
                sites = set(session.receipt()["p"].sites)
            assert sites == changes.keys()
            assert torch.equal(logits(model, prompts), plain), "detach"


def test_the_middle_of_a_block_equals_a_hook_on_its_second_norm(
    family: Family, model: nn.Module, anatomy: Anatomy, prompts: Tensor
) -> None:
    layers = [layer for layer, letter in enumerate(family.mid) if letter != "-"]
    missing = [layer for layer, letter in enumerate(family.mid) if letter == "-"]
    for layer in missing[:1]:
        with pytest.raises(sk.PlanError, match=rf"resid_mid\[{layer}\]: no such site"):
            sk.steer(model, sk.Plan(sk.add(direction(1)), layers=layer, site="resid_mid"))
    if not layers:
        return
    plan = sk.Plan(sk.ablate(direction(1)), layers=layers, site="resid_mid", name="p")
    change = ablated(plan.steps[0].edits[0].rows[None].vectors[0])
    plain = logits(model, prompts)
    with hooked(anatomy, {sk.Site(layer, "resid_mid"): change for layer in layers}):
        expected = logits(model, prompts)
    assert not torch.allclose(expected, plain, rtol=1e-2)
    for backend in ("reference", "cpu"):
        for fuse in ("sites", "none"):
            with sk.steer(model, plan, backend=backend, fuse=fuse):
                check(family, backend, logits(model, prompts), expected)
            assert torch.equal(logits(model, prompts), plain)


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=str)
def test_models_without_one_residual_stream_raise(family: Family, reason: str) -> None:
    model = build(family)
    with pytest.raises(sk.PlanError, match=re.escape(reason)):
        sk.steer(model, sk.Plan(sk.add(direction(1))))


def test_a_norm_found_by_its_name_would_be_wrong(prompts: Tensor) -> None:
    # gemma3n has an input_layernorm, and it reads another tensor; this is why norms are found by what they read
    model = build(next(family for family in FAMILIES if family.name == "gemma3n_text"))
    anatomy = examine(model)
    change = added(3.0 * direction(1), 1.0)
    with hooked(anatomy, {sk.Site(1, "resid_pre"): change}):
        expected = logits(model, prompts)
    named = anatomy.blocks[1].get_submodule("input_layernorm")

    def edit_input(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].copy_(change(args[0]))

    handle = named.register_forward_pre_hook(edit_input)
    found = logits(model, prompts)
    handle.remove()
    effect = float((expected - logits(model, prompts)).abs().max())
    assert float((expected - found).abs().max()) > 0.1 * effect
