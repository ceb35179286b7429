"""Attach, change and detach in any order, on several models at once: a stock copy with plain hooks is the truth."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import steerkern as sk
from steerkern.runtime import session as session_module
from steerkern.runtime.sites import Anatomy, examine
from tests.runtime import families
from tests.runtime.models import tiny_llama

LENGTH, NEW = 5, 3
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
IDS = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(3)) * MASK
# logits up to 10 in fp32: the kernel's norms sum in another order, relative 2e-7 each, which random layers amplify
TOLERANCE = 1e-3
LONGER = torch.cat([IDS, IDS[:, -4:]], 1)
MODELS = 3
SESSIONS = 3
"""At most this many on one model."""


@dataclass(frozen=True)
class Subject:
    """A model, a stock copy to hook, and a twin that nobody touches."""

    model: nn.Module
    copy: nn.Module
    twin: nn.Module
    anatomy: Anatomy
    """Of the copy."""
    before: list[object]
    weights: dict[str, Tensor]
    plain: Tensor
    """The twin's logits."""


@functools.cache
def subjects() -> list[Subject]:
    # fused everywhere; fused in the last norm only; fused nowhere
    names = ("olmo2", "opt-post-norm")
    models: list[nn.Module] = [tiny_llama(num_hidden_layers=3)]
    models += [families.build(next(f for f in families.FAMILIES if f.name == name)) for name in names]
    found = []
    for model in models:
        generate(model)  # transformers leaves its own attributes behind at the first call
        stock, twin = copy.deepcopy(model), copy.deepcopy(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(Subject(model, stock, twin, examine(stock), traces(model), weights, logits(twin, IDS)))
    assert len(found) == MODELS
    return found


def traces(model: nn.Module) -> list[object]:
    """What attaching changes: classes, attributes, hooks, and where the weights lie."""
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = {key: list(held) for key, held in vars(module).items() if key.endswith("_hooks") and held is not None}
        found.append((name, type(module), list(vars(module)), hooks, module.training))
    found.extend((name, t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items())
    return found


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask_of(ids.shape[1]), use_cache=False).logits.clone()


def mask_of(length: int) -> Tensor:
    return torch.cat([MASK, MASK.new_ones(2, length - LENGTH)], 1)


def generate(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens ``[2, LENGTH + NEW]`` and logits ``[2, NEW, V]``."""
    out = model.generate(  # type: ignore[operator]
        input_ids=IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


# a plan as data, as a Plan, and as plain torch


EDITS: dict[str, tuple[Callable[[Tensor], sk.Edit], Callable[[Tensor], Tensor]]] = {
    "add": (lambda v: sk.add(v, 2.0), lambda a: torch.full_like(a, 2.0)),
    "ablate": (sk.ablate, lambda a: -a),
    "clamp": (lambda v: sk.clamp(v, 1.5), lambda a: 1.5 - a),
    "cap": (lambda v: sk.cap(v, -0.2, 0.3), lambda a: a.clamp(-0.2, 0.3) - a),
}
"""Kind -> the edit, and what it adds to the coordinate ``a``."""


@dataclass(frozen=True)
class Recipe:
    """One plan; it fits any of the models."""

    name: str
    kind: str
    seed: int
    places: tuple[str, ...]
    scope: str | int

    def vector(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return nn.functional.normalize(torch.randn(width, generator=generator), dim=0)

    def plan(self, anatomy: Anatomy) -> sk.Plan:
        edit = EDITS[self.kind][0](self.vector(anatomy.fingerprint.width))
        parts = [
            sk.Plan(edit, site=site.name, layers=site.layer, scope=self.scope, name=self.name)
            for site in self.sites(anatomy)
        ]
        return functools.reduce(lambda one, other: one + other, parts)

    def sites(self, anatomy: Anatomy) -> list[sk.Site]:
        last = anatomy.fingerprint.layers - 1
        table = {
            "first": sk.Site(0, "resid_pre"),
            "second": sk.Site(1, "resid_pre"),
            "middle": sk.Site(1, "resid_mid"),
            "end": sk.Site(last, "resid_post"),
        }
        known = {found.site for found in anatomy.sites}
        sites = [site for place in self.places if (site := table[place]) in known]
        return sites or [table["second"]]

    def tokens(self, past: int, count: int, prompt: int) -> Tensor:
        """``[2, count]``: which tokens after ``past`` ones are written, where the first ``prompt`` are the prompt."""
        index = torch.arange(past, past + count).expand(2, count)
        chosen = {"all": index >= 0, "prompt": index < prompt, "decode": index >= prompt, -1: index == prompt - 1}
        return chosen[self.scope] & (mask_of(past + count)[:, past:] == 1)


RECIPES = st.builds(
    Recipe,
    name=st.sampled_from(["a", "b", "c", "d"]),
    kind=st.sampled_from(list(EDITS)),
    seed=st.integers(0, 1),  # few, so that edits meet and do not commute
    places=st.sets(st.sampled_from(["first", "second", "middle", "end"]), min_size=1, max_size=3).map(
        lambda places: tuple(sorted(places))
    ),
    scope=st.sampled_from(["all", "prompt", "decode", -1]),
)
FUSE = st.sampled_from(["all", "sites", "none"])
WHICH = st.integers(0, MODELS - 1)


@dataclass
class Live:
    """A session that is attached, and what it should be doing."""

    subject: Subject
    session: sk.Session
    fuse: str
    recipes: dict[str, Recipe]
    scales: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, ...]] | None = None

    def added(self, site: sk.Site, state: Tensor, past: int, prompt: int) -> Tensor:
        """What this session adds to a state ``[2, S, H]`` at a site: all its plans act on the state as it arrived."""
        total = torch.zeros_like(state)
        for name, recipe in self.recipes.items():
            if site not in recipe.sites(self.subject.anatomy):
                continue
            vector = recipe.vector(state.shape[-1])
            chosen = recipe.tokens(past, state.shape[1], prompt)
            if self.rows is not None:
                chosen = chosen & torch.tensor([name in names for names in self.rows])[:, None]
            change = EDITS[recipe.kind][1](state @ vector) * self.scales.get(name, 1.0)
            total += (change * chosen)[..., None] * vector
        return total


@contextlib.contextmanager
def plain_hooks(subject: Subject, sessions: list[Live], past: int = 0, prompt: int = LENGTH) -> Iterator[nn.Module]:
    """The copy, steered by plain hooks in order of attachment, for a forward after ``past`` tokens."""

    def steered(site: sk.Site, state: Tensor) -> Tensor:
        for live in sessions:
            state = state + live.added(site, state, past, prompt)
        return state

    handles = []
    for found in subject.anatomy.sites:
        if not any(found.site in r.sites(subject.anatomy) for live in sessions for r in live.recipes.values()):
            continue

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, site: sk.Site = found.site) -> object:
            if site.name == "resid_pre":
                return (steered(site, args[0]), *args[1:]), kwargs
            args[0].copy_(steered(site, args[0]))  # the block goes on with the tensor that it gave to its norm
            return None

        def after(module: nn.Module, args: object, output: Tensor, site: sk.Site = found.site) -> Tensor:
            return steered(site, output)

        if found.site.name == "resid_post":
            handles.append(found.door.register_forward_hook(after))
        else:
            handles.append(found.door.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield subject.copy
    finally:
        for handle in handles:
            handle.remove()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


class Steering(RuleBasedStateMachine):
    """Sessions come, change and go."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []

    def on(self, which: int) -> list[Live]:
        return [live for live in self.live if live.subject is subjects()[which]]

    def one(self, number: int) -> Live:
        return self.live[number % len(self.live)]

    some_live = precondition(lambda self: self.live)

    # coming and going

    @initialize(which=WHICH, recipe=RECIPES, fuse=FUSE)
    def first(self, which: int, recipe: Recipe, fuse: str) -> None:
        self.attach(which, [recipe], fuse)

    @rule(which=WHICH, recipes=st.lists(RECIPES, min_size=1, max_size=2, unique_by=lambda r: r.name), fuse=FUSE)
    def attach(self, which: int, recipes: list[Recipe], fuse: str) -> None:
        if len(self.on(which)) == SESSIONS:
            return
        subject = subjects()[which]
        plans = [recipe.plan(subject.anatomy) for recipe in recipes]
        session = sk.steer(subject.model, plans, fuse=fuse, silent="ignore")
        self.live.append(Live(subject, session, fuse, {recipe.name: recipe for recipe in recipes}))

    @some_live
    @rule(number=st.integers(0, 8), recipe=RECIPES, fuse=FUSE)
    def nest(self, number: int, recipe: Recipe, fuse: str) -> None:
        live = self.one(number)
        for met in live.recipes.values():  # where a session acts already
            recipe = replace(recipe, places=met.places, seed=met.seed)
        self.attach(next(i for i, s in enumerate(subjects()) if s is live.subject), [recipe], fuse)

    @some_live
    @rule(number=st.integers(0, 8), how=st.sampled_from(["detach", "exit", "raise"]))
    def leave(self, number: int, how: str) -> None:
        gone = self.live.pop(number % len(self.live))
        if how == "detach":
            gone.session.detach()
        elif how == "exit":
            with gone.session:
                logits(gone.subject.model, IDS)
        else:
            with pytest.raises(ZeroDivisionError), gone.session:
                raise ZeroDivisionError
        assert not gone.session.attached
        gone.session.detach()

    @rule(which=WHICH, recipe=RECIPES, fuse=FUSE, fails_at=st.integers(0, 12))
    def attach_that_fails(self, which: int, recipe: Recipe, fuse: str, fails_at: int) -> None:
        subject, real, left = subjects()[which], session_module.attach, [fails_at]
        before = traces(subject.model)

        def attach(*args: object) -> None:
            if left[0] == 0:
                raise MemoryError
            left[0] -= 1
            real(*args)  # type: ignore[arg-type]

        with mock.patch.object(session_module, "attach", attach):
            try:
                session = sk.steer(subject.model, recipe.plan(subject.anatomy), fuse=fuse, silent="ignore")
            except MemoryError:
                assert traces(subject.model) == before
            else:
                session.detach()

    @rule(which=WHICH, recipe=RECIPES, fuse=FUSE)
    def a_plan_that_does_not_fit(self, which: int, recipe: Recipe, fuse: str) -> None:
        subject = subjects()[which]
        before, fits = traces(subject.model), recipe.plan(subject.anatomy)
        wrong = sk.Plan(sk.add(recipe.vector(fits.width)), layers=40, name="wrong")
        with pytest.raises(sk.PlanError, match="layer 40"):
            sk.steer(subject.model, [fits, wrong], fuse=fuse)
        assert traces(subject.model) == before

    # changes while attached

    @some_live
    @rule(number=st.integers(0, 8), recipe=RECIPES)
    def add(self, number: int, recipe: Recipe) -> None:
        live = self.one(number)
        plan = recipe.plan(live.subject.anatomy)
        if recipe.name in live.recipes:
            with pytest.raises(sk.PlanError, match="is in this session already"):
                live.session.add(plan)
            return
        live.session.add(plan)
        live.recipes[recipe.name] = recipe

    @some_live
    @rule(number=st.integers(0, 8), name=st.sampled_from(["a", "b", "c", "d"]))
    def remove(self, number: int, name: str) -> None:
        live = self.one(number)
        assigned = any(name in names for names in live.rows or ())
        if assigned or name not in live.recipes:
            with pytest.raises(sk.PlanError, match="is assigned to rows" if assigned else "no plan"):
                live.session.remove(name)
            return
        live.session.remove(name)
        del live.recipes[name]
        live.scales.pop(name, None)

    @some_live
    @rule(number=st.integers(0, 8), which=st.integers(0, 3), scale=st.sampled_from([-1.0, 0.0, 0.5, 2.0]))
    def scale(self, number: int, which: int, scale: float) -> None:
        live = self.one(number)
        if live.recipes:
            name = sorted(live.recipes)[which % len(live.recipes)]
            live.session.set(name, scale=scale)
            live.scales[name] = scale

    @some_live
    @rule(number=st.integers(0, 8), picks=st.none() | st.tuples(*[st.sets(st.sampled_from("abcd"))] * 2))
    def rows(self, number: int, picks: tuple[set[str], set[str]] | None) -> None:
        live = self.one(number)
        rows = None if picks is None else [tuple(sorted(pick & live.recipes.keys())) for pick in picks]
        live.session.rows(None if rows is None else [names or None for names in rows])
        live.rows = rows

    # running

    @rule(which=WHICH)
    def generate(self, which: int) -> None:
        subject = subjects()[which]
        tokens, found = generate(subject.model)
        with plain_hooks(subject, self.on(which)) as reference:
            expected = logits(reference, tokens)[:, LENGTH - 1 : -1]
        same(found, expected)

    @rule(which=WHICH)
    def a_longer_prompt(self, which: int) -> None:
        subject = subjects()[which]
        with plain_hooks(subject, self.on(which), prompt=LONGER.shape[1]) as reference:
            expected = logits(reference, LONGER)
        real = mask_of(LONGER.shape[1]) == 1
        same(logits(subject.model, LONGER)[real], expected[real])

    @rule(which=WHICH, change=st.sampled_from(["add", "scale", "rows"]), recipe=RECIPES)
    def a_request_that_is_changed_on_its_way(self, which: int, change: str, recipe: Recipe) -> None:
        subject, here = subjects()[which], self.on(which)
        caches: dict[nn.Module, object] = {subject.model: None, subject.copy: None}
        for past, count in ((0, LENGTH), (LENGTH, 1), (LENGTH + 1, 1), (LENGTH + 2, 1), (LENGTH + 3, 1)):
            if past == LENGTH + 2 and here:  # in the middle of decoding, where row maps are reused
                number = self.live.index(here[0])
                if change == "scale":
                    self.scale(number, 0, 2.0)
                elif change == "rows":
                    self.rows(number, (set(here[0].recipes), set()))
                else:
                    free = next((name for name in "abcd" if name not in here[0].recipes), "a")
                    self.add(number, replace(recipe, name=free))
            found = []
            with torch.no_grad(), plain_hooks(subject, here, past):
                for model, cache in caches.items():
                    out = model(
                        input_ids=LONGER[:, past : past + count], attention_mask=mask_of(past + count),
                        past_key_values=cache, use_cache=True,
                    )  # fmt: skip
                    caches[model] = out.past_key_values
                    found.append(out.logits[mask_of(past + count)[:, past:] == 1])
            same(*found)

    @rule(which=WHICH, how=st.sampled_from(["ids", "rows"]))
    def a_forward_that_raises(self, which: int, how: str) -> None:
        subject, here = subjects()[which], self.on(which)
        if how == "ids":
            with pytest.raises(IndexError):
                logits(subject.model, IDS + 10_000)
        elif here:
            here[-1].session.rows([None] * 3)
            with pytest.raises(sk.PlanError, match="rows name 3 sequences, the batch has 2 prompts"):
                logits(subject.model, IDS)
            rows = here[-1].rows
            here[-1].session.rows(None if rows is None else [names or None for names in rows])

    # what always holds

    @invariant()
    def logits_are_those_of_plain_hooks(self) -> None:
        for which, subject in enumerate(subjects()):
            here = self.on(which)
            if here:
                with plain_hooks(subject, here) as reference:
                    expected = logits(reference, IDS)
                same(logits(subject.model, IDS)[MASK == 1], expected[MASK == 1])

    @invariant()
    def models_without_a_session_are_stock(self) -> None:
        for which, subject in enumerate(subjects()):
            if not self.on(which):
                assert traces(subject.model) == subject.before

    def teardown(self) -> None:
        for live in self.live:
            live.session.detach()
        for subject in subjects():
            assert traces(subject.model) == subject.before
            weights = subject.model.state_dict()
            assert all(torch.equal(weights[name], tensor) for name, tensor in subject.weights.items())
            for stock in (subject.model, subject.twin):
                assert torch.equal(logits(stock, IDS), subject.plain)


Steering.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # explaining a failure takes minutes more
    suppress_health_check=list(HealthCheck),
)
TestSteering = Steering.TestCase


@pytest.mark.parametrize("first", ["all", "sites", "none"])
@pytest.mark.parametrize("second", ["all", "sites", "none"])
@pytest.mark.parametrize("place", ["second", "middle", "end"])
def test_a_later_session_at_the_doors_does_not_overtake_an_earlier_one_in_the_norms(
    first: str, second: str, place: str
) -> None:
    subject = subjects()[0]
    live = [
        Live(subject, sk.steer(subject.model, recipe.plan(subject.anatomy), fuse=fuse), fuse, {recipe.name: recipe})
        for recipe, fuse in (
            (Recipe("cut", "ablate", 0, (place,), "all"), first),
            (Recipe("push", "add", 0, (place,), "all"), second),
        )
    ]
    try:
        results = []
        for order in (live, live[::-1]):
            with plain_hooks(subject, order) as reference:
                results.append(logits(reference, IDS)[MASK == 1])
        assert float((results[0] - results[1]).abs().max()) > 20 * TOLERANCE
        same(logits(subject.model, IDS)[MASK == 1], results[0])
    finally:
        for one in live:
            one.session.detach()
    assert traces(subject.model) == subject.before
