"""Finds the faults that are put into a module: AST nodes, and what takes their place.

Left alone: docstrings, annotations, what is logged, texts (a string with a space in it, an f-string, a string handed
to an exception), `__repr__` and `__str__`, decorators, assertions, and what only type checkers see.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_ORDER: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    # The neighbour at the limit, and the opposite.
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
_SILENT = frozenset({"__repr__", "__str__", "__all__"})
_LOGGERS = frozenset({"log", "logger", "logging", "warnings"})


@dataclass(slots=True, eq=False)
class Mutant:
    """
    One fault.

    :param path: module, relative to the project.
    :param line: where it is.
    :param lines: a test reaches it if it executes one of these.
    :param function: qualified name and first line of the outermost function whose body holds it; None for what
        runs at import.
    :param names: what runs at import is reached through these names.
    """

    path: str
    line: int
    lines: range
    before: str
    after: str
    function: tuple[str, int] | None
    names: frozenset[str]
    place: tuple[ast.AST, str, int | None]
    node: ast.AST
    number: int = 0

    @property
    def text(self) -> str:
        return f"{self.path}:{self.line}: {_cut(self.before)}  ->  {_cut(self.after)}"

    def apply(self) -> None:
        """Put the fault into the tree that this mutant was found in."""
        parent, name, index = self.place
        if index is None:
            setattr(parent, name, self.node)
        else:
            getattr(parent, name)[index] = self.node


@dataclass(slots=True)
class Module:
    """A module's source as a tree, and its mutants."""

    path: str
    tree: ast.Module
    mutants: list[Mutant] = field(default_factory=list)


def find_mutants(path: str, source: str) -> Module:
    """Parse a module and find every fault to put into it."""
    tree = ast.parse(source)
    finder = _Finder(path)
    finder.block(tree, "body", _Scope())
    return Module(path, tree, finder.found)


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where the finder is."""

    qualified: str = ""
    function: tuple[str, int] | None = None
    names: frozenset[str] = frozenset()
    lines: range = range(0)
    # Texts for people are left alone: in a `raise`, say.
    message: bool = False


class _Finder:
    def __init__(self, path: str) -> None:
        self._path = path
        self.found: list[Mutant] = []

    def _add(
        self, scope: _Scope, place: tuple[ast.AST, str, int | None], before: ast.AST, after: ast.AST
    ) -> None:
        assert isinstance(before, ast.expr | ast.stmt | ast.excepthandler)
        for node in ast.walk(after):
            if isinstance(node, ast.expr | ast.stmt) and not hasattr(node, "lineno"):
                ast.copy_location(node, before)
        self.found.append(
            Mutant(
                self._path,
                before.lineno,
                scope.lines,
                ast.unparse(before),
                ast.unparse(after),
                scope.function,
                scope.names,
                place,
                after,
            )
        )

    # Statements

    def block(self, parent: ast.AST, name: str, scope: _Scope) -> None:
        for index, statement in enumerate(getattr(parent, name)):
            self._statement((parent, name, index), statement, scope)

    def _statement(self, place: tuple[ast.AST, str, int | None], node: ast.stmt, scope: _Scope) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node, scope)
                return
            case ast.ClassDef():
                inner = replace(scope, qualified=f"{scope.qualified}{node.name}.")
                if scope.function is None:
                    inner = replace(inner, names=frozenset({node.name}))
                self.block(node, "body", inner)
                return
            case ast.Import() | ast.ImportFrom() | ast.Global() | ast.Nonlocal() | ast.Assert() | ast.Pass():
                return
        scope = replace(scope, lines=_header(node))
        match node:
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.Expr(value=ast.Call() as call) | ast.Expr(value=ast.Await(value=ast.Call() as call)):
                if not _is_log(call):
                    self._add(scope, place, node, ast.Pass())
                    self._fields(node, scope)
            case ast.Assign() | ast.AnnAssign():
                self._assignment(place, node, scope)
            case ast.AugAssign():
                self._add(scope, place, node, ast.Pass())
                if (operator := _ARITHMETIC.get(type(node.op))) and not _is_text(node.value):
                    changed = copy.copy(node)
                    changed.op = operator()
                    self._add(scope, place, node, changed)
                self._expression((node, "value", None), node.value, scope)
            case ast.Return(value=ast.expr() as value):
                # The opposite of a comparison is a mutant of its own.
                if not isinstance(value, ast.Constant | ast.Compare):
                    self._add(scope, place, node, ast.Return(value=ast.Constant(None)))
                self._fields(node, scope)
            case ast.Raise():
                self._add(scope, place, node, ast.Pass())
                if node.exc is not None:
                    self._expression((node, "exc", None), node.exc, replace(scope, message=True))
            case ast.Delete():
                self._add(scope, place, node, ast.Pass())
            case ast.Break():
                self._add(scope, place, node, ast.Continue())
            case ast.Continue():
                self._add(scope, place, node, ast.Break())
            case ast.If() if _is_typing_only(node.test):
                self.block(node, "orelse", scope)
            case ast.If() | ast.While():
                self._condition((node, "test", None), node.test, scope)
                self.block(node, "body", scope)
                self.block(node, "orelse", scope)
            case ast.Try():
                self._try(node, scope)
            case _:
                self._fields(node, scope)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> None:
        if node.name in _SILENT or any(
            _last_name(decorator) == "overload" for decorator in node.decorator_list
        ):
            return
        outer = replace(scope, lines=range(node.lineno, node.body[0].lineno))
        if scope.function is None:
            # A default is made at import, but matters only when the function runs.
            last = node.end_lineno or node.lineno
            outer = replace(
                outer, names=scope.names | {node.name}, lines=range(node.body[0].lineno, last + 1)
            )
        self._defaults(node.args, outer)
        inner = replace(scope, qualified=f"{scope.qualified}{node.name}.")
        if scope.function is None:
            # `co_firstlineno` counts the decorators in.
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            inner = replace(inner, function=(scope.qualified + node.name, first), names=frozenset())
        self.block(node, "body", inner)

    def _defaults(self, arguments: ast.arguments, scope: _Scope) -> None:
        for name in ("defaults", "kw_defaults"):
            for index, default in enumerate(getattr(arguments, name)):
                if default is not None:
                    self._expression((arguments, name, index), default, scope)

    def _assignment(
        self, place: tuple[ast.AST, str, int | None], node: ast.Assign | ast.AnnAssign, scope: _Scope
    ) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        named = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if node.value is None or named & _SILENT:
            return
        if scope.function is None and not scope.names:
            scope = replace(scope, names=frozenset(named))
        for index, target in enumerate(targets):
            if isinstance(target, ast.Attribute | ast.Subscript):
                if len(targets) == 1:
                    self._add(scope, place, node, ast.Pass())
                at = ("targets", index) if isinstance(node, ast.Assign) else ("target", None)
                self._expression((node, *at), target, scope)
        self._expression((node, "value", None), node.value, scope)

    def _try(self, node: ast.Try, scope: _Scope) -> None:
        for name in ("body", "orelse", "finalbody"):
            self.block(node, name, scope)
        for handler in node.handlers:
            if isinstance(handler.type, ast.Tuple):
                last = handler.type.end_lineno or handler.lineno
                inner = replace(scope, lines=range(handler.lineno, last + 1))
                for index in range(len(handler.type.elts)):
                    fewer = copy.copy(handler.type)
                    fewer.elts = [other for at, other in enumerate(handler.type.elts) if at != index]
                    self._add(inner, (handler, "type", None), handler.type, fewer)
            self.block(handler, "body", scope)

    # Expressions

    def _fields(self, node: ast.AST, scope: _Scope) -> None:
        """Every child in its turn, whatever this is."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_comment"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                match child:
                    case ast.stmt():
                        self._statement((node, name, index), child, scope)
                    case ast.expr():
                        self._expression((node, name, index), child, scope)
                    case ast.comprehension():
                        for number, condition in enumerate(child.ifs):
                            self._condition((child, "ifs", number), condition, scope)
                        self._expression((child, "iter", None), child.iter, scope)
                    case ast.match_case():
                        self._case(child, scope)
                    case ast.arguments():
                        self._defaults(child, scope)
                    case ast.keyword() | ast.withitem():
                        self._fields(child, scope)

    def _case(self, node: ast.match_case, scope: _Scope) -> None:
        if node.guard is not None:
            last = node.guard.end_lineno or node.guard.lineno
            inner = replace(scope, lines=range(node.guard.lineno, last + 1))
            self._condition((node, "guard", None), node.guard, inner)
        self.block(node, "body", scope)

    def _condition(self, place: tuple[ast.AST, str, int | None], node: ast.expr, scope: _Scope) -> None:
        """The opposite of a condition, unless another mutant of it is that."""
        opposite = isinstance(node, ast.Compare) and len(node.ops) == 1
        if not opposite and not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            self._add(scope, place, node, ast.UnaryOp(ast.Not(), node))
        self._expression(place, node, scope)

    def _expression(self, place: tuple[ast.AST, str, int | None], node: ast.expr, scope: _Scope) -> None:
        for after in _replacements(node, scope.message):
            self._add(scope, place, node, after)
        match node:
            case ast.JoinedStr() | ast.Constant() | ast.Name():
                return
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
                return
            case ast.Call():
                self._call(place, node, scope)
                return
            case ast.IfExp():
                self._condition((node, "test", None), node.test, scope)
                self._expression((node, "body", None), node.body, scope)
                self._expression((node, "orelse", None), node.orelse, scope)
                return
        self._fields(node, scope)

    def _call(self, place: tuple[ast.AST, str, int | None], node: ast.Call, scope: _Scope) -> None:
        name = _last_name(node.func)
        if _is_log(node) or name in ("TypeVar", "ParamSpec", "NewType"):
            return
        if name.endswith(("Error", "Exception", "Warning")) or name == "add_note":
            scope = replace(scope, message=True)
        self._expression((node, "func", None), node.func, scope)
        for index, argument in enumerate(node.args):
            if not (index == 0 and name == "cast"):
                self._expression((node, "args", index), argument, scope)
        for index, keyword in enumerate(node.keywords):
            self._expression((keyword, "value", None), keyword.value, scope)
            flipped = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
            if keyword.arg is not None and scope.function is not None and not flipped:
                fewer = copy.copy(node)
                fewer.keywords = [other for at, other in enumerate(node.keywords) if at != index]
                self._add(scope, place, node, fewer)


def _replacements(node: ast.expr, message: bool) -> Iterator[ast.expr]:
    """What takes the place of an expression."""
    match node:
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() as number):
            yield ast.Constant(number + 1)
        case ast.Constant(value=float() as number):
            # Seconds, or a share: one more of 600.0 s would be no fault.
            yield ast.Constant(number * 2 or 1.0)
        case ast.Constant(value=str() as text):
            if not message and not any(character.isspace() for character in text):
                yield ast.Constant(text + "X")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
            yield operand
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.BinOp():
            operator = _ARITHMETIC.get(type(node.op))
            if operator and not (_is_text(node.left) or _is_text(node.right)):
                yield ast.BinOp(node.left, operator(), node.right)
        case ast.Compare():
            for index, operator_now in enumerate(node.ops):
                for other in _ORDER[type(operator_now)]:
                    operators = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                    yield ast.Compare(node.left, operators, node.comparators)


def _header(node: ast.stmt) -> range:
    """The lines of a statement without the blocks in it."""
    last = node.end_lineno or node.lineno
    match node:
        case ast.If(test=inner) | ast.While(test=inner) | ast.For(iter=inner) | ast.AsyncFor(iter=inner):
            last = inner.end_lineno or node.lineno
        case ast.With() | ast.AsyncWith():
            last = node.items[-1].context_expr.end_lineno or node.lineno
        case ast.Match():
            last = node.subject.end_lineno or node.lineno
        case ast.Try():
            last = node.lineno
    return range(node.lineno, last + 1)


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=function):
            return _last_name(function)
    return ""


def _is_log(node: ast.Call) -> bool:
    match node.func:
        case ast.Attribute(value=ast.Name(id=name)) | ast.Attribute(value=ast.Attribute(attr=name)):
            return name in _LOGGERS
    return False


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _is_typing_only(node: ast.expr) -> bool:
    if isinstance(node, ast.Compare):
        return _last_name(node.left) == "__name__"
    return _last_name(node) == "TYPE_CHECKING"


def _cut(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def mentioned(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that code mentions, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name, node.lineno
