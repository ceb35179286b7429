"""Put handlers into a module and take them out again.

An attached module gets a subclass of its own class, made here, and a list of handlers in its ``__dict__``; when the
last handler leaves, both are gone and the module is what it was. Instances are changed, classes never are. A class that
differs is also what ``torch.compile`` guards on: a graph traced without steering is not reused with it, which forward
hooks do not ensure.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import PlanError
from .blocks import DIRECT, hooked, rewritten

METHODS = ("generate", "prepare_inputs_for_generation", "init_continuous_batching", "generate_batch")
"""Methods of a module that a handler can stand around."""


class NormHandler(Protocol):
    """Stands in for a norm: edits the state in place and returns it normalised."""

    def edit(self, state: Tensor) -> None:
        """Edit ``state [..., H]`` in place."""

    def __call__(self, state: Tensor) -> Tensor:
        """Edit ``state`` in place and return it normalised."""


class CallHandler(Protocol):
    """Acts before and after a module is called."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """See the arguments; ``kwargs`` may be changed, and what is returned takes the place of ``args``."""

    def after(self, output: Any) -> None:
        """See what came out; None if the call raised."""


def attach(module: nn.Module, kind: str, handler: Any) -> None:
    """Add a handler of ``kind`` (``norm``, ``block``, ``call`` or one of :data:`METHODS`) to one module."""
    handlers = module.__dict__.get(_slot(kind))
    if handlers is not None:
        handlers.append(handler)
        return
    kinds = (*_kinds(type(module)), kind)
    base = stock_class(type(module))
    module.__dict__[_slot(kind)] = [handler]
    try:
        module.__class__ = _steered(base, kinds)
    except TypeError as error:
        del module.__dict__[_slot(kind)]
        raise PlanError(f"{base.__name__} cannot be steered: {error}") from None


def detach(module: nn.Module, kind: str, handler: Any) -> None:
    """Take a handler out; the others stay in their order."""
    handlers = module.__dict__.get(_slot(kind), [])
    if handler not in handlers:
        return
    handlers.remove(handler)
    if not handlers:
        del module.__dict__[_slot(kind)]
        # transformers 4.57 keeps the bound forward on the module once it has collected hidden states
        if kind == "block" and getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        kinds = tuple(k for k in _kinds(type(module)) if k != kind)
        module.__class__ = _steered(stock_class(type(module)), kinds) if kinds else stock_class(type(module))


def occupied(module: nn.Module, kind: str) -> bool:
    """Whether a module has a handler of ``kind``."""
    return _slot(kind) in module.__dict__


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """``model`` as it is without any handler, for as long as the context lasts."""
    steered = [(module, type(module)) for module in model.modules() if _kinds(type(module))]
    for module, cls in steered:
        module.__class__ = stock_class(cls)
    try:
        yield
    finally:
        for module, cls in steered:
            module.__class__ = cls


def _slot(kind: str) -> str:
    return f"_steerkern_{kind}"


def stock_class(cls: type) -> Any:
    """The class that a steered module has without its handlers."""
    return getattr(cls, "_steerkern_base", cls)


def _kinds(cls: type) -> tuple[str, ...]:
    return getattr(cls, "_steerkern_kinds", ())


@functools.cache
def _steered(base: type, kinds: tuple[str, ...]) -> type:
    """The subclass of ``base`` that asks its handlers; it keeps the name, which checkpoints record."""
    members: dict[str, Any] = {"_steerkern_base": base, "_steerkern_kinds": kinds, "__module__": base.__module__}
    members["__qualname__"], members["__doc__"] = base.__qualname__, base.__doc__
    members["__reduce_ex__"] = _refuse_copy
    if "norm" in kinds:
        members["forward"] = _forward
        if "call" not in kinds and base.__call__ is nn.Module.__call__:
            members["__call__"], members[DIRECT] = _norm_call, True
    if "block" in kinds:
        members["forward"] = rewritten(base).forward  # type: ignore[union-attr]
    if "call" in kinds:
        members["__call__"] = _call_of(base)
    for name in METHODS:
        if name in kinds:
            members[name] = _method_of(base, name)
    return type(base)(base.__name__, (base,), members)


def _refuse_copy(self: Any, protocol: int) -> Any:
    raise PlanError(f"{type(self).__name__} is being steered; detach the session before copying or pickling the model")


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    handlers: list[NormHandler] = self._steerkern_norm
    for handler in handlers[:-1]:
        handler.edit(hidden_states)
    return handlers[-1](hidden_states)


def _norm_call(self: Any, hidden_states: Tensor) -> Tensor:
    # nn.Module's own way to forward takes longer than the kernel
    handlers: list[NormHandler] = self._steerkern_norm
    if len(handlers) == 1 and not hooked(self):
        return handlers[0](hidden_states)
    out: Tensor = nn.Module.__call__(self, hidden_states)
    return out


def _call_of(base: type) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        handlers: list[CallHandler] = self._steerkern_call
        entered, output = 0, None
        try:
            for handler in handlers:
                replaced = handler.before(self, args, kwargs)
                args = args if replaced is None else replaced
                entered += 1
            output = base.__call__(self, *args, **kwargs)
        finally:
            for handler in handlers[:entered]:
                handler.after(output)
        return output

    return call


def _method_of(base: type, name: str) -> Any:
    stock = getattr(base, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handlers: list[CallHandler] = getattr(self, _slot(name))
        entered, made = 0, None
        try:
            for handler in handlers:
                handler.before(self, args, kwargs)
                entered += 1
            made = stock(self, *args, **kwargs)
            return made
        finally:
            for handler in handlers[:entered]:
                handler.after(made)

    return method
