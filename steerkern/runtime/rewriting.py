"""A block's own ``forward`` with its residual additions handed to two functions: ``add_norm`` and ``add``.

The source of ``forward`` is parsed, and of its statements only these change::

    h = residual + x                                  residual, x = add_norm(residual, x, self.norm)
    residual = h                             ->       h = residual
    x = self.norm(h)

    h = residual + x                         ->       h = add(residual, x)
    return h                                          return h

``add_norm(a, b, norm)`` must return ``(a + b, norm(a + b))`` and ``add(a, b)`` must return ``a + b``; with functions
that do just that, the rewritten forward is the original. That the source is what runs is checked, not assumed: compiled
as it stands, it must give the very bytecode of the function.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

_ADD_NORM, _ADD = "_steerkern_add_norm", "_steerkern_add"
_OPERANDS = ("_steerkern_left", "_steerkern_right")


@dataclass(frozen=True)
class Rewritten:
    """A forward whose additions go through other functions."""

    forward: Callable[..., Any]
    norms: tuple[str, ...]
    """Attributes of the block that hold a norm whose input is now summed with it."""


def rewrite(forward: Callable[..., Any], add_norm: Callable[..., Any], add: Callable[..., Any]) -> Rewritten | str:
    """``forward`` with its additions replaced, or the reason why that is not certain to be the same code.

    A function that decorators wrap gets the decorators of its source again; other wrappers are left to the class that
    the result becomes a member of.
    """
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return "its forward is not a Python function"
    if inner.__code__.co_freevars or inner.__code__.co_cellvars:
        return "its forward is part of a closure"
    definition = _definition(inner)
    if definition is None:
        return "the source of its forward is not there, or is not what runs"
    body, norms = _replace(definition.body)
    if not norms:
        return "it has no sum that goes straight into a norm"
    definition.body = body
    made = _compile(definition, inner, {_ADD_NORM: add_norm, _ADD: add})
    made.__qualname__ = inner.__qualname__
    return Rewritten(made, norms)


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree that ``function`` was compiled from."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if len(tree.body) != 1 or not isinstance(definition, ast.FunctionDef):
        return None
    plain = ast.Module([_undecorated(definition)], [])
    compiled = compile(plain, function.__code__.co_filename, "exec", _flags(function), dont_inherit=True)
    same = any(isinstance(c, CodeType) and _same(c, function.__code__) for c in compiled.co_consts)
    ast.increment_lineno(tree, start - 1)  # so that tracebacks name the lines of the file
    return definition if same else None


def _undecorated(definition: ast.FunctionDef) -> ast.FunctionDef:
    plain = ast.FunctionDef(**{name: value for name, value in ast.iter_fields(definition)})
    plain.decorator_list = []
    return ast.copy_location(plain, definition)


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same, wherever they come from."""
    names = ("co_code", "co_names", "co_varnames", "co_argcount", "co_kwonlyargcount", "co_posonlyargcount", "co_flags")
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    if len(one.co_consts) != len(other.co_consts):
        return False
    return all(
        _same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else type(a) is type(b) and a == b
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _flags(function: FunctionType) -> int:
    known = 0
    for name in ("annotations", "generator_stop"):
        known |= getattr(__import__("__future__"), name).compiler_flag
    return function.__code__.co_flags & known


def _compile(definition: ast.FunctionDef, function: FunctionType, given: dict[str, Callable[..., Any]]) -> Any:
    """The function that ``definition`` defines among the globals of ``function``, which get no new name."""
    arguments = ast.arguments([], [ast.arg(name) for name in given], None, [], [], None, [])
    returned = ast.Return(ast.Name(definition.name, ast.Load()))
    factory = ast.FunctionDef("_steerkern_make", arguments, [definition, returned], [])
    if "type_params" in ast.FunctionDef._fields:
        factory.type_params = []
    tree = ast.fix_missing_locations(ast.Module([factory], []))
    found: dict[str, Any] = {}
    code = compile(tree, function.__code__.co_filename, "exec", _flags(function), dont_inherit=True)
    exec(code, function.__globals__, found)
    return found["_steerkern_make"](*given.values())


# statements


def _replace(body: list[ast.stmt]) -> tuple[list[ast.stmt], tuple[str, ...]]:
    """The statements of a forward with their additions replaced, and the norms that take part."""
    made: list[ast.stmt] = []
    norms: list[str] = []
    at = 0
    while at < len(body):
        group = _Group.at(body, at)
        if group is None:
            made.append(body[at])
            at += 1
            continue
        rest = body[at + group.length :]
        made += [ast.copy_location(one, body[at]) for one in group.replaced(rest)]
        at += group.length
        if group.norm is not None:
            norms.append(group.norm.attr)
    return made, tuple(norms)


@dataclass(frozen=True)
class _Group:
    """Statements around one addition."""

    length: int
    operands: tuple[ast.expr, ast.expr]
    sums: tuple[str, ...]
    """Names that the sum is bound to."""
    norm: ast.Attribute | None = None
    out: str = ""
    """The name that the norm's output is bound to."""

    @staticmethod
    def at(body: list[ast.stmt], at: int) -> _Group | None:
        """The group that starts with statement ``at``, if one does."""
        name, value = _assigned(body[at])
        if name is None or not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
            return None
        operands, sums, following = (value.left, value.right), (name,), at + 1
        alias, source = _assigned(body[following]) if following < len(body) else (None, None)
        if alias is not None and isinstance(source, ast.Name) and source.id == name:
            sums, following = (name, alias), following + 1
        if following == len(body):
            return None
        out, call = _assigned(body[following])
        if out is not None and (norm := _norm_of(call, sums)) is not None:
            return _Group(following + 1 - at, operands, sums, norm, out)
        if len(sums) == 1 and isinstance(body[following], ast.Return):
            return _Group(1, operands, sums)
        return None

    def replaced(self, rest: list[ast.stmt]) -> Iterator[ast.stmt]:
        """What takes the group's place before ``rest``."""
        bound = {*self.sums, self.out}
        kept = set(_loaded(rest)) - bound
        given: list[ast.expr] = []
        for operand, other, name in zip(self.operands, reversed(self.operands), _OPERANDS, strict=True):
            if isinstance(operand, ast.Name) and operand.id not in kept:
                given.append(ast.Name(operand.id, ast.Load()))
                continue
            # dropout may return its very argument: a name that is bound anew should not keep that alive. What is read
            # later gets a second name instead, and so counts as held.
            free = [n for n in _loaded([operand]) if n in bound and n not in _loaded([other])]
            name = free[0] if free else name
            yield _assign([name], operand)
            given.append(ast.Name(name, ast.Load()))
        if self.norm is None:
            yield _assign([self.sums[0]], ast.Call(ast.Name(_ADD, ast.Load()), given, []))
            return
        given.append(self.norm)
        last = self.sums[-1] if self.sums[-1] != self.out else self.sums[0]
        yield _assign([last, self.out], ast.Call(ast.Name(_ADD_NORM, ast.Load()), given, []))
        for name in self.sums:
            if name not in (last, self.out):
                yield _assign([name], ast.Name(last, ast.Load()))


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """Name and value of an assignment to one name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return None, None


def _norm_of(call: ast.expr | None, sums: tuple[str, ...]) -> ast.Attribute | None:
    """``self.norm`` if ``call`` is ``self.norm(sum)``."""
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    given, called = call.args[0], call.func
    if not isinstance(given, ast.Name) or given.id not in sums or not isinstance(called, ast.Attribute):
        return None
    return called if isinstance(called.value, ast.Name) and called.value.id == "self" else None


def _loaded(nodes: list[ast.stmt] | list[ast.expr]) -> list[str]:
    """The names that are read in ``nodes``."""
    inner = (node for one in nodes for node in ast.walk(one))
    return [node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]


def _assign(names: list[str], value: ast.expr) -> ast.Assign:
    targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in names]
    return ast.Assign([targets[0] if len(targets) == 1 else ast.Tuple(targets, ast.Store())], value)
