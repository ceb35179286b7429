"""Watch one forward: which norms read the residual tensor of each block, and what happened to it before.

Tensors are followed by their storage. A storage that an operation copied or combined is no longer *clean*: a norm that
reads it then comes too late to edit it, because the copy would miss the edit.

Attention, experts and the like cost most of a forward and touch no residual. What such a *part* of a block returns is
recorded at its first call; later parts of the same name, classes and sizes, in blocks of the same class, are not run:
zeros stand in for them. Every block's own code runs, and a part that is handed the residual itself always runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .decoder import block_input, block_output
from .norms import Called, Kind, kind, norm_like

PROBE = (2, 3)
"""Batch and tokens of the probe; they differ, so that their order shows."""


@dataclass(frozen=True, eq=False)
class Read:
    """A norm-like module that was called with the residual tensor of a block."""

    module: nn.Module
    storage: int
    clean: bool
    """Nothing had copied, combined or written that tensor before, and its rows were given whole and in order."""


@dataclass(eq=False)
class Passage:
    """One call of a block."""

    block: nn.Module
    entered: Tensor
    left: Tensor
    reads: list[Read] = field(default_factory=list)
    """Of the block's input."""
    sum_reads: list[Read] = field(default_factory=list)
    """Of the input with something added to it."""
    carried: set[int] = field(default_factory=set)
    """Storages that something was added to: the residual goes on in them, not in a norm's output."""
    revisited: bool = False
    """Whether an operation read the block's input again after the block."""


@dataclass(frozen=True)
class StandIn:
    """What a part returned, and by their path the norms that were called inside it."""

    output: Callable[[], Any]
    norms: tuple[tuple[str, Called], ...]


class Watch(TorchFunctionMode):
    """Follows the residual tensor through the blocks of a decoder during :meth:`run`."""

    def __init__(self, decoder: nn.Module, blocks: nn.ModuleList, width: int, shortcut: bool = True) -> None:
        super().__init__()
        self.decoder = decoder
        self.blocks = blocks
        self.width = width
        self.shortcut = shortcut
        self.passages: list[Passage] = []
        self.final_reads: list[Read] = []
        """Of the last block's output."""
        self.norms: dict[nn.Module, Called] = {}
        """Every norm-like module that was called with one tensor."""
        self._passage: Passage | None = None  # the block being run
        self._passed: dict[int, Passage] = {}  # blocks already run, by the storage of their input
        self._state: Tensor | None = None  # what entered it, or what the last one returned
        self._versions: dict[int, tuple[Tensor, int]] = {}  # storage of the state and of what is made from it
        self._scaled: set[int] = set()  # the state times something
        self._sums: set[int] = set()  # with something added to it
        self._touched: set[int] = set()
        self._stand_ins: dict[tuple[Any, ...], StandIn] = {}
        self._heard: set[nn.Module] = set()
        self._inside = 0  # depth of norm-like modules

    def run(self, modules: Iterable[nn.Module]) -> None:
        """Run the decoder on a few tokens; ``modules`` are all of its own, restored afterwards."""
        device = next(self.decoder.parameters()).device
        ids = torch.zeros(PROBE, dtype=torch.long, device=device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_undisturbed(modules, hooks=not self.shortcut))
            stack.enter_context(self._listening())
            stack.enter_context(self)
            self.decoder(input_ids=ids, use_cache=False)

    # what operations do to the residual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and self.shortcut:  # most of the work, and its values do not matter
            out = args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        else:
            out = func(*args, **kwargs) if kwargs else func(*args)
        if self._state is not None and isinstance(out, (Tensor, tuple, list)):
            self._follow(func, args, kwargs or {}, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        given = _storages((*args, *kwargs.values()))
        for storage in given & self._passed.keys():
            self._passed[storage].revisited = True
        into = given & self._versions.keys()
        if not into:
            return
        adds = self._inside == 0 and func in _ADD and len(given) > 1
        scales = self._inside == 0 and func in _MULTIPLY
        if (adds or scales) and self._passage is not None:
            self._passage.carried |= into
        if _storages((out,)) <= given:
            if func is F.dropout and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0.0:
                self._touched |= into  # it copies in training mode
            if adds and isinstance(out, Tensor) and _storage(out) in into:
                self._derive(out, self._sums)
            return  # a view, or written in place, which its version tells
        unread = not into <= self._sums & self._touched
        self._touched |= into
        if adds and unread:
            self._derive(out, self._sums)
        elif scales and not into & self._sums:
            self._derive(out, self._scaled)

    def _derive(self, tensor: Tensor, into: set[int]) -> None:
        storage = _storage(tensor)
        self._versions[storage] = (tensor, tensor._version)
        into.add(storage)
        self._touched.discard(storage)

    def _start(self, state: Tensor) -> None:
        self._state = state
        self._passed.pop(_storage(state), None)  # a block that writes its state in place
        self._versions = {_storage(state): (state, state._version)}
        self._scaled, self._sums, self._touched = set(), set(), set()

    def _clean(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        if storage not in self._versions or storage in self._touched:
            return False
        state, version = self._versions[storage]
        in_order = tensor.is_contiguous() and state.is_contiguous()
        whole = tensor.numel() == state.numel() and tensor.shape[-1] == state.shape[-1]
        return state._version == version and whole and (in_order or tensor.stride() == state.stride())

    # what modules are called with

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        wraps: dict[nn.Module, Callable[..., Any]] = {}
        for child in self.decoder.children():
            if child is not self.blocks:
                wraps.update((m, self._part(m, None)) for m in child.modules() if norm_like(m))
        for block in self.blocks:
            wraps[block] = self._block(block)
            for name, part in _parts(block):
                if part not in wraps:  # one part may serve several blocks
                    wraps[part] = self._part(part, (type(block), name))
        self._heard = set(wraps)
        with _forwards(wraps):
            yield

    def _block(self, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                state = block_input(args, kwargs)
                self._passage = passage = Passage(block, state, state)
                self.passages.append(passage)
                self.final_reads = []
                self._start(state)
            output = forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                passage.left = block_output(output)
                self._passage = None
                self._passed[_storage(passage.entered)] = passage
                self._start(passage.left)
            return output

        return run

    def _part(self, part: nn.Module, place: tuple[type, str] | None) -> Callable[..., Any]:
        forward = part.forward
        norm_kind = kind(part) if norm_like(part) else None
        key = None if place is None else (*place, norm_kind or _make(part))

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                single = norm_kind is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
                read = Read(part, _storage(args[0]), self._clean(args[0])) if single else None
                stand_in = self._stand_ins.get(key) if self.shortcut and key is not None else None
                if read is not None and stand_in is not None:
                    self._note(read, norm_kind, args[0])
                    return stand_in.output()
                given = _storages((*args, *kwargs.values()))
                if stand_in is not None and self._versions.keys().isdisjoint(given):
                    self._note_inside(part, stand_in)
                    return stand_in.output()
            before = len(self.norms)
            output = self._run(part, forward, single, args, kwargs)
            with torch._C.DisableTorchFunction():
                passed_through = not given.isdisjoint(_storages((output,)))
                if key is not None and not passed_through and (like := _like(output)) is not None:
                    paths = {module: path for path, module in part.named_modules()}
                    inside = list(self.norms.items())[before:]
                    norms = tuple((paths[norm], called) for norm, called in inside if norm in paths)
                    self._stand_ins[key] = StandIn(like, norms)
                if read is not None and not passed_through:
                    self._note(read, norm_kind, args[0])
            return output

        return run

    def _run(self, part: nn.Module, forward: Any, single: bool, args: Any, kwargs: Any) -> Any:
        if single:
            self._inside += 1
            try:
                return forward(*args)
            finally:
                self._inside -= 1
        inner = [m for m in part.modules() if m not in self._heard and norm_like(m)]
        with _forwards({m: self._part(m, None) for m in inner}):
            self._heard.update(inner)
            try:
                return forward(*args, **kwargs)
            finally:
                self._heard.difference_update(inner)

    def _note(self, read: Read, norm_kind: Kind | None, tensor: Tensor) -> None:
        self._note_call(read.module, Called(norm_kind or (), tensor.shape[-1], tensor.dtype))
        if read.storage not in self._versions:
            return
        if self._passage is None:
            self.final_reads.append(read)
        elif read.storage in self._sums:
            self._passage.sum_reads.append(read)
        elif read.storage not in self._scaled:
            self._passage.reads.append(read)
        self._touched.add(read.storage)  # who reads it next comes too late to edit it

    def _note_inside(self, part: nn.Module, stand_in: StandIn) -> None:
        for path, called in stand_in.norms:
            with contextlib.suppress(AttributeError):
                if kind(norm := part.get_submodule(path)) == called.kind:
                    self._note_call(norm, called)

    def _note_call(self, norm: nn.Module, called: Called) -> None:
        before = self.norms.get(norm)
        self.norms[norm] = replace(called, times=before.times + 1) if before else called


_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_MULTIPLY = {torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a block calls itself; lists and dicts are not called, their items are."""
    for name, child in block._modules.items():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", part) for inner, part in _parts(child))
        elif child is not None:
            yield name, child


def _make(module: nn.Module) -> tuple[Any, ...]:
    """Classes and sizes: what parts must share for one to stand in for the other."""
    own = [p.shape for p in module._parameters.values() if p is not None]
    return (type(module), *own, *[_make(child) for child in module._modules.values() if child is not None])


@contextlib.contextmanager
def _forwards(wraps: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for a while."""
    former = [(vars(module), vars(module).get("forward")) for module in wraps]
    try:
        for module, forward in wraps.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for own, before in former:
            if before is None:
                own.pop("forward", None)
            else:
                own["forward"] = before


@contextlib.contextmanager
def _undisturbed(modules: Iterable[nn.Module], hooks: bool) -> Iterator[None]:
    """Modules in eval mode and, unless ``hooks``, without anyone's forward hooks, which would see the probe."""
    former: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            own = vars(module)
            if own["training"]:
                former.append((own, "training", True))
                own["training"] = False
            for name in () if hooks else ("_forward_hooks", "_forward_pre_hooks"):
                if own[name]:
                    former.append((own, name, own[name]))
                    own[name] = type(own[name])()
        yield
    finally:
        for own, name, value in former:
            own[name] = value


def _storage(tensor: Any) -> int:
    try:
        address: int = tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a DTensor has no storage of its own
        address = tensor._local_tensor.untyped_storage().data_ptr()
    return address


def _storages(values: Iterable[Any]) -> set[int]:
    """The storages of all tensors among values and in nested tuples, lists and dicts of them."""
    found: set[int] = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(_storage(value))
        elif isinstance(value, (tuple, list)):
            found |= _storages(value)
        elif isinstance(value, dict):
            found |= _storages(value.values())
    return found


def _like(value: Any) -> Callable[[], Any] | None:
    """What makes a value of the same structure with zeros for tensors; None where that is not certain."""
    if isinstance(value, Tensor):
        shape, dtype, device = value.shape, value.dtype, value.device
        return lambda: torch.zeros(shape, dtype=dtype, device=device)
    if value is None or isinstance(value, (bool, int, float, str)):
        return lambda: value
    if type(value) not in (tuple, list):
        return None
    items = [_like(item) for item in value]
    return None if None in items else lambda: type(value)(item() for item in items if item is not None)
