"""What the modules of a package define, and which of their names a piece of code reads."""

import ast
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

Node = TypeVar("Node", bound=ast.AST)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Name(NamedTuple):
    """A name in a module; `attr` is "" for the module itself."""

    module: str
    attr: str = ""

    @property
    def root(self) -> str:
        """The package."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}.{self.attr}" if self.attr else self.module


class Module:
    """A module's source.

    Attributes:
        name: as it is imported.
        path: its file.
        body: its statements.
        defined: name -> the statement that defines it; "line N" -> one that is called for what it
            does, as for an entry in a registry.
        imported: name -> what it is elsewhere.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.body = ast.parse(path.read_text()).body
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, Name] = {}
        for statement in self.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.imported |= dict(imports(statement))
            for each in defines(statement):
                self.defined[each] = statement

    @property
    def effects(self) -> list[str]:
        """Names of the statements that are called for what they do."""
        return [name for name in self.defined if " " in name]


@functools.cache
def module(name: str) -> Module | None:
    """A module of this package or another with sources; None if there is none of the name."""
    root, *rest = name.split(".")
    found = importlib.util.find_spec(root)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent.joinpath(*rest)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return Module(name, path) if path.is_file() else None


def imports(statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Name]]:
    """What an import binds: name -> what it is.

    Raises:
        ValueError: `import a.b`, which binds a and needs b; relative and starred imports.
    """
    for alias in statement.names:
        if isinstance(statement, ast.ImportFrom):
            if statement.level or alias.name == "*":
                raise ValueError(f"line {statement.lineno}: {ast.unparse(statement)}")
            yield alias.asname or alias.name, Name(str(statement.module), alias.name)
        elif "." in alias.name and not alias.asname:
            raise ValueError(f"line {statement.lineno}: {ast.unparse(statement)}")
        else:
            yield alias.asname or alias.name, Name(alias.name)


def defines(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module or class defines, imports aside; see `Module.defined`."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return [f"line {statement.lineno}"]
    if isinstance(statement, ast.Assign):
        found = [node for target in statement.targets for node in ast.walk(target)]
    elif isinstance(statement, ast.AnnAssign):
        found = [statement.target]
    else:
        return []
    return [node.id for node in found if isinstance(node, ast.Name)]


def bound(body: list[ast.stmt]) -> set[str]:
    """Names that are a function's own because its body binds them, its arguments aside."""
    out: set[str] = set()
    elsewhere: set[str] = set()
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                out.add(node.name)
                continue
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                walrus = [x.target for x in ast.walk(node) if isinstance(x, ast.NamedExpr)]
                out |= {target.id for target in walrus}
                continue
            case ast.Name(ctx=ast.Store() | ast.Del()):
                out.add(node.id)
            case ast.Import() | ast.ImportFrom():
                out |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                out |= {node.name} - {None}  # type: ignore[arg-type]
            case ast.Global():
                elsewhere |= set(node.names)
            case ast.MatchMapping():
                out |= {node.rest} - {None}  # type: ignore[arg-type]
        todo += ast.iter_child_nodes(node)
    return out - elsewhere


Use = Callable[[ast.Name | ast.Attribute, frozenset[str]], ast.expr]


class Names(ast.NodeTransformer):
    """Replaces the names of the module that a definition reads.

    A name with an attribute, as `tiling.tiles`, is given as a whole. `use` and `annotate` take a
    name and those that are bound around it, and say what is to stand there. `use` is given what is
    read when the code runs; `annotate` whole annotations, which never are.
    """

    def __init__(self, use: Use, annotate: Callable[[ast.expr], ast.expr]):
        self.use, self.annotate = use, annotate
        self.around: frozenset[str] = frozenset()
        self.within = False

    def inside(self, names: set[str], nodes: list[Node]) -> list[Node]:
        """Visits nodes within a scope that binds names."""
        outer = self.around, self.within
        self.around, self.within = self.around | names, True
        out = [self.visit(node) for node in nodes]
        self.around, self.within = outer
        return out

    def visit_Name(self, node: ast.Name) -> ast.expr:
        own = node.id in self.around or (self.within and not isinstance(node.ctx, ast.Load))
        return node if own else self.use(node, self.around)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id not in self.around:
            return self.use(node, self.around)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = self.annotate(node.annotation)
        node.target = self.visit(node.target)
        node.value = node.value and self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self.function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.function(node)

    def function(self, node: Function) -> ast.AST:
        """A function: what surrounds it, and its body, where its own names are bound."""
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        names = self.arguments(node.args) | bound(node.body)
        node.returns = node.returns and self.annotate(node.returns)
        node.body = self.inside(names, node.body)
        return node

    def arguments(self, args: ast.arguments) -> set[str]:
        """Names of arguments; their defaults and annotations are visited."""
        args.defaults = [self.visit(each) for each in args.defaults]
        args.kw_defaults = [each and self.visit(each) for each in args.kw_defaults]
        found = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        found += [each for each in (args.vararg, args.kwarg) if each]
        for arg in found:
            arg.annotation = arg.annotation and self.annotate(arg.annotation)
        return {arg.arg for arg in found}

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        (node.body,) = self.inside(self.arguments(node.args), [node.body])
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.bases = [self.visit(each) for each in node.bases]
        node.keywords = [self.visit(each) for each in node.keywords]
        own: set[str] = set()  # methods do not see them; what stands below them does
        for i, each in enumerate(node.body):
            if isinstance(each, Function):
                decorators = self.inside(own, each.decorator_list)
                each.decorator_list = []
                node.body[i] = self.visit(each)
                each.decorator_list = decorators
            else:
                (node.body[i],) = self.inside(own, [each])
            own |= set(defines(each))
        return node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        return self.comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return self.comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        return self.comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        return self.comprehension(node)

    def comprehension(self, node: ast.AST) -> ast.AST:
        """A comprehension, whose targets are bound throughout."""
        names = {
            each.id
            for part in node.generators  # type: ignore[attr-defined]
            for each in ast.walk(part.target)
            if isinstance(each, ast.Name)
        }
        first = node.generators[0]  # type: ignore[attr-defined]
        shown = self.visit(first.iter)  # the first is read outside
        first.iter = ast.Constant(None)
        outer, self.around = self.around, self.around | names
        self.generic_visit(node)
        self.around = outer
        first.iter = shown
        return node
