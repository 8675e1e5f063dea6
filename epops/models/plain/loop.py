"""The loop over experts in a block's forward, or in a method that it calls, found in the source and cut out of it.

What the loop adds up is ``out[t] += w[t, k] * expert[idx[t, k]](x[t])`` in some spelling. The source says where the loop is
and which variable it fills; which variables are x, idx and w is found by trying (`search`).
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..site import set_method

CAPTURE, ROUTED = "__epops_capture__", "_epops_routed"
METHODS_INTO = ("index_add_", "scatter_add_", "index_put_", "index_copy_")
METHODS_FROM = ("index_add", "scatter_add", "index_put", "index_copy")


class _Reached(Exception):
    """Carries what a method saw out of the forward that called it."""


class Loop:
    """A method with one loop over experts, "forward" or one that forward calls, as functions of the module and its arguments."""

    def __init__(self, method: str, function: Any, tree: ast.FunctionDef, loop: ast.For, out: str) -> None:
        self.method, self.function, self.tree, self.loop, self.out = method, function, tree, loop, out

    @property
    def line(self) -> int:
        """Where it is in its file."""
        return self.function.__code__.co_firstlineno + self.loop.lineno - 1

    def before(self) -> Callable[..., dict[str, Any]]:
        """(module, x) → the variables that are known before the loop, of the block on ``x``."""
        return self._reaching([])

    def after(self) -> Callable[..., dict[str, Any]]:
        """(module, x) → the variables that are known after the loop."""
        return self._reaching([self.loop])

    def _reaching(self, statements: list[ast.stmt]) -> Callable[..., dict[str, Any]]:
        def reach(found: dict[str, Any]) -> None:
            raise _Reached(dict(found))

        run = self.forward(self._build([*statements, _statement(f"{CAPTURE}(locals())")], {CAPTURE: reach}))

        def call(module: nn.Module, x: Any) -> dict[str, Any]:
            try:
                run(module, x)
            except _Reached as reached:
                return reached.args[0]
            raise ValueError(f"{self.method} was not called")

        return call

    def forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward with ``function`` in the place of the method, for a while."""
        if self.method == "forward":
            return function

        def call(module: nn.Module, *args: Any) -> Any:
            set_method(module, self.method, function)
            try:
                return inspect.unwrap(type(module).forward)(module, *args)
            finally:
                delattr(module, self.method)

        return call

    def replaced(self, x: str, idx: str, weights: str | None) -> Callable[..., Any]:
        """The method with ``out = self._epops_routed(out, x, idx, weights)`` in the place of the loop.

        A method of the instance, since Dynamo looks for globals in the module that the code was written in.
        """
        owner = self.tree.args.args[0].arg
        call = f"{self.out} = {owner}.{ROUTED}({self.out}, {x}, {idx}, {weights})"
        return self._build([_statement(call)], {})

    def _build(self, statements: list[ast.stmt], names: dict[str, Any]) -> Callable[..., Any]:
        tree = _Replace(self.loop, statements).visit(copy.deepcopy(self.tree))
        module = ast.fix_missing_locations(ast.Module([tree], []))
        ast.increment_lineno(module, self.function.__code__.co_firstlineno - 1)
        code = compile(module, inspect.getsourcefile(self.function) or "<epops>", "exec")
        scope = {**self.function.__globals__, **names}
        exec(code, scope)
        built = scope[self.tree.name]
        built.__defaults__, built.__kwdefaults__ = self.function.__defaults__, self.function.__kwdefaults__
        return built


def find(module: nn.Module, holder: str) -> Loop | None:
    """The loop that reads ``self.<holder>`` in ``module``'s forward or in a method that it calls; None if not just one does."""
    found = []
    methods = ["forward"]
    for method in methods:
        read = _source(module, method)
        if read is not None:
            function, tree = read
            methods += [name for name in _called(tree) if name not in methods]
            loop = _find_in(method, function, tree, holder)
            found += [] if loop is None else [loop]
    return found[0] if len(found) == 1 else None


def _source(module: nn.Module, method: str) -> tuple[types.FunctionType, ast.FunctionDef] | None:
    function = inspect.getattr_static(type(module), method, None)
    function = inspect.unwrap(function) if callable(function) else None
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return None
    tree.decorator_list = []
    return function, tree


def _called(tree: ast.FunctionDef) -> list[str]:
    """Names of what a method calls on its own object."""
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    owner = tree.args.args[0].arg
    return [call.attr for call in calls if isinstance(call.value, ast.Name) and call.value.id == owner]


def _find_in(method: str, function: types.FunctionType, tree: ast.FunctionDef, holder: str) -> Loop | None:
    owner = tree.args.args[0].arg
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For) and _reads(n, owner, holder)]
    outermost = [n for n in loops if not any(n is not m and n in ast.walk(m) for m in loops)]
    if len(outermost) != 1:
        return None
    written = _filled(outermost[0])
    return Loop(method, function, tree, outermost[0], written) if written else None


def _reads(node: ast.AST, owner: str, attribute: str) -> bool:
    return any(
        isinstance(n, ast.Attribute) and n.attr == attribute and isinstance(n.value, ast.Name) and n.value.id == owner
        for n in ast.walk(node)
    )


def _filled(loop: ast.For) -> str:
    """The one variable from outside that the loop writes into; "" if there are none or several."""
    names = set()
    for node in ast.walk(loop):
        target: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS_INTO:
            target = node.func.value
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript):
            target = node.target
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Name):
            names.add(target.id)
    assigned = {
        n.id for s in loop.body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    # A variable that an iteration makes itself is not the result; one that goes through ``out = out.index_add(…)`` is.
    outside = (names - assigned) or {name for s in loop.body for name in _carried(s)}
    return outside.pop() if len(outside) == 1 else ""


def _carried(statement: ast.stmt) -> set[str]:
    """Variables that are assigned from a scatter into themselves."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Call):
            call = node.value.func
            if isinstance(call, ast.Attribute) and call.attr in METHODS_FROM and isinstance(call.value, ast.Name):
                found |= {node.targets[0].id} & {call.value.id}
    return found


class _Replace(ast.NodeTransformer):
    """One statement by several."""

    def __init__(self, old: ast.stmt, new: list[ast.stmt]) -> None:
        self.position, self.new = (old.lineno, old.col_offset), new

    def visit_For(self, node: ast.For) -> Any:
        return self.new if (node.lineno, node.col_offset) == self.position else self.generic_visit(node)


def _statement(text: str) -> ast.stmt:
    function = ast.parse(f"def f():\n    {text}").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.body[0]
