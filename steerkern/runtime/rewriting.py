"""A block's own ``forward`` with its sums handed to the norms that read them.

The source of ``forward`` is parsed, and of its statements only these change::

    h = residual + x
    residual = h                 ->      residual, x = add_norm(residual, x, self.norm)
    x = self.norm(h)

``add_norm(a, b, norm)`` must return ``(a + b, norm(a + b))``; with a function that does just that, the rewritten
forward is the original. That the source is what runs is checked, not assumed: compiled as it stands, it must give the
very bytecode of the function.
"""

from __future__ import annotations
import __future__

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

AddNorm = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""``add_norm(a, b, norm)``: the sum ``a + b`` and what ``norm`` makes of it."""

_ADD_NORM, _MAKE = "_steerkern_add_norm", "_steerkern_make"


@dataclass(frozen=True)
class Rewritten:
    """A forward some of whose sums go through another function."""

    forward: Callable[..., Any]
    norms: tuple[str, ...]
    """The attributes of the block that hold the norms of those sums."""


def rewrite(forward: Callable[..., Any], add_norm: AddNorm) -> Rewritten | str:
    """``forward`` with its sums given to ``add_norm``, or the reason why that is not certain to be the same code.

    The decorators of the source stand around the result too, other wrappers do not.
    """
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType) or inner.__code__.co_freevars or inner.__code__.co_cellvars:
        return "its forward is not a plain Python function"
    definition = _definition(inner)
    if definition is None:
        return "the source of its forward is not there, or is not what runs"
    definition.body, norms = _replace(definition.body)
    if not norms:
        return "it has no sum that goes straight into a norm"
    return Rewritten(_compile(definition, inner, add_norm), norms)


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree that ``function`` was compiled from."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse("if 1:\n" + "".join(lines))  # indented as it is, or its docstring would differ
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0].body[0]  # type: ignore[attr-defined]
    if not isinstance(definition, ast.FunctionDef):
        return None
    tree = ast.Module([definition], [])
    decorators, definition.decorator_list = definition.decorator_list, []
    compiled = _code(tree, function)
    definition.decorator_list = decorators
    ast.increment_lineno(tree, start - 2)  # so that tracebacks name the lines of the file
    same = any(isinstance(made, CodeType) and _same(made, function.__code__) for made in compiled.co_consts)
    return definition if same else None


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same, wherever they stand."""
    if (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED or any(getattr(one, n) != getattr(other, n) for n in _CODE):
        return False
    return [(type(value), value) for value in one.co_consts] == [(type(value), value) for value in other.co_consts]


_CODE = ("co_code", "co_names", "co_varnames", "co_argcount", "co_kwonlyargcount", "co_posonlyargcount")


def _code(tree: ast.Module, function: FunctionType) -> CodeType:
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code: CodeType = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    return code


def _compile(definition: ast.FunctionDef, function: FunctionType, add_norm: AddNorm) -> Callable[..., Any]:
    """What ``definition`` defines among the globals of ``function``, which get no new name."""
    tree = ast.parse(f"def {_MAKE}({_ADD_NORM}):\n    return {definition.name}")
    factory = tree.body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, definition)
    found: dict[str, Any] = {}
    exec(_code(ast.fix_missing_locations(tree), function), function.__globals__, found)
    made: Callable[..., Any] = found[_MAKE](add_norm)
    made.__qualname__ = function.__qualname__
    return made


def _replace(body: list[ast.stmt]) -> tuple[list[ast.stmt], tuple[str, ...]]:
    """The statements of a forward with its sums replaced, and the norms that read them."""
    made: list[ast.stmt] = []
    norms: list[str] = []
    at = 0
    while at < len(body):
        found = _Sum.at(body, at)
        if found is None:
            made.append(body[at])
            at += 1
            continue
        made += [ast.copy_location(statement, body[at]) for statement in found.replaced()]
        norms.append(found.norm.attr)
        at += found.length
    return made, tuple(norms)


@dataclass(frozen=True)
class _Sum:
    """Statements that add and normalise."""

    length: int
    summands: tuple[ast.expr, ast.expr]
    names: tuple[str, ...]
    """What the sum is bound to."""
    norm: ast.Attribute
    normalised: str
    """What the norm's output is bound to."""

    @staticmethod
    def at(body: list[ast.stmt], at: int) -> _Sum | None:
        """The statements from number ``at`` on, if they are such."""
        following = iter([*map(_assigned, body[at : at + 3]), None])
        first = next(following)
        if first is None or not isinstance(first[1], ast.BinOp) or not isinstance(first[1].op, ast.Add):
            return None
        names: tuple[str, ...] = (first[0],)
        then = next(following)
        if then is not None and isinstance(then[1], ast.Name) and then[1].id == first[0]:
            names, then = (*names, then[0]), next(following)
        norm = None if then is None else _norm_of(then[1], names)
        if then is None or norm is None:
            return None
        return _Sum(len(names) + 1, (first[1].left, first[1].right), names, norm, then[0])

    def replaced(self) -> Iterator[ast.stmt]:
        """What takes their place."""
        call = ast.Call(ast.Name(_ADD_NORM, ast.Load()), [*self.summands, self.norm], [])
        last = next((name for name in reversed(self.names) if name != self.normalised), self.normalised)
        pair: list[ast.expr] = [ast.Name(last, ast.Store()), ast.Name(self.normalised, ast.Store())]
        yield ast.Assign([ast.Tuple(pair, ast.Store())], call)
        for name in set(self.names) - {last, self.normalised}:
            yield ast.Assign([ast.Name(name, ast.Store())], ast.Name(last, ast.Load()))


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """Name and value of an assignment to one name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return None


def _norm_of(call: ast.expr, names: tuple[str, ...]) -> ast.Attribute | None:
    """``self.norm`` of a call ``self.norm(name)`` with one of ``names``."""
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    given, called = call.args[0], call.func
    if not isinstance(given, ast.Name) or given.id not in names or not isinstance(called, ast.Attribute):
        return None
    return called if isinstance(called.value, ast.Name) and called.value.id == "self" else None
