"""One Python file of a package's own sources that needs neither vfjax nor JAX.

From a few classes and functions all definitions are followed that they read. What computes in JAX
is left out of vfjax's classes: methods that read JAX, or a definition that does. The rest stands in
one namespace, in the order in which its modules import one another; of two that are called the
same, one is named after its module, too.

transformers' `custom_object_save` copies whole files with their relative imports, stickytape and
pinliner hold whole modules as texts: none leaves out what a part of a class needs.
"""

import ast
import builtins
import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator

from converters.hf.names import Module, Name, Names, defines, module
from vfjax import InputError, __version__

OWN = {"vfjax", "converters"}
"""Packages whose definitions are copied."""

JAX = {"jax", "flax"}
"""Packages of what is left out."""

IMPORTED = {"PIL", "huggingface_hub", "numpy", "torch", "transformers", *sys.stdlib_module_names}
"""Packages that the file may import; within `try`, others too."""

INSTEAD = {"converters.hf.reading": "converters.hf.written"}
"""Modules -> those whose definitions of the same names take the place of theirs in the file."""

ANY = Name("typing", "Any")
"""In annotations, in place of what the file lacks."""

HEAD = f'''"""A model that vfjax {__version__} fused: all that transformers needs to run it.

Made from vfjax's sources (Apache-2.0, as this file); it is written anew with every export.
"""

from __future__ import annotations
'''


def bundle(roots: Iterable[Name], others: Iterable[Name] = (), more: str = "") -> str:
    """The source of one module.

    Args:
        roots: what it has to define, under these names.
        others: what it has to define, under any.
        more: code at its end.

    Raises:
        InputError: what is reached uses JAX as a whole, imports another package, or is written in
            a way that can't be moved to another module.
    """
    roots, others = list(dict.fromkeys(roots)), list(others)
    hidden: dict[Name, set[str]] = {ANY: set()}  # what is reached -> what it can't be called
    todo, done = [*roots, *others], set[Name]()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        hidden.setdefault(name, set())
        if name.root in OWN:
            found = reads(kept(name), owner(name))
            for read, around in found:
                hidden.setdefault(read, set()).update(around)
            todo += [read for read, _ in found]
            todo += [Name(name.module, each) for each in effects(owner(name))]
    called = named(hidden, roots)
    own = {name for name in hidden if name.root in OWN}
    parts = [HEAD, "\n".join(sorted(_import(name, called[name]) for name in hidden.keys() - own))]
    for home in in_order({name.module for name in own}):
        parts.append(f"\n# {home.name}")
        for statement in home.body:
            names = [Name(home.name, each) for each in defines(statement)]
            if own.intersection(names):
                parts.append(_written(kept(names[0]), home, called))
    text = "\n\n".join([*parts, more]).rstrip() + "\n"
    check(text)
    return text


def owner(name: Name) -> Module:
    """The module that a definition of this package is in."""
    found = module(name.module)
    if found is None or name.attr not in found.defined:
        raise _refused(name, "no definition", "one")
    return found


def instead(name: str) -> Module | None:
    """The module of a name in the file, see `INSTEAD`."""
    return module(INSTEAD.get(name, name))


def effects(home: Module) -> list[str]:
    """Names of the statements of a module that are called for what they do.

    Raises:
        InputError: statements of another kind than definitions, imports and calls.
    """
    for each in home.body:
        typed = isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING"
        text = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
        if not (typed or text or defines(each) or isinstance(each, ast.Import | ast.ImportFrom)):
            raise _refused(Name(home.name), ast.unparse(each).splitlines()[0], "definitions")
    return home.effects


def resolve(home: Module, attr: str) -> Name | None:
    """What a name in a module is, where it is defined; None: a builtin, or none that it has."""
    if attr in home.defined:
        return Name(home.name, attr)
    if attr not in home.imported:
        return None
    target = home.imported[attr]
    if target.root not in OWN:
        return target
    whole = instead(".".join(part for part in target if part))
    if whole is not None:
        return Name(whole.name)
    there = instead(target.module)
    return None if there is None else resolve(there, target.attr)


def read_of(home: Module, node: ast.Name | ast.Attribute) -> tuple[Name | None, str]:
    """What a name, or an attribute of one, is; and the attribute, unless it is part of that.

    Raises:
        InputError: a module that is used as a value.
    """
    attr = node.attr if isinstance(node, ast.Attribute) else ""
    base = node.value if isinstance(node, ast.Attribute) else node
    assert isinstance(base, ast.Name)
    name = resolve(home, base.id)
    if name is None or name.attr or name.root not in OWN:
        return name, attr
    whole = module(name.module)
    found = None if whole is None else resolve(whole, attr)
    if found is None:
        raise _refused(Name(home.name, base.id), f"the module {name} as a value", "its parts")
    return found, ""


Reads = list[tuple[Name, frozenset[str]]]
"""What is read, each with the names that are bound around it."""


def reads(node: ast.stmt, home: Module) -> Reads:
    """What a definition reads when it runs, and what others' packages its annotations name.

    Raises:
        InputError: an import that can't be moved.
    """
    found: Reads = []

    def use(each: ast.Name | ast.Attribute, around: frozenset[str]) -> ast.expr:
        name, _ = read_of(home, each)
        if name is not None:
            found.append((name, around))
        return each

    def annotate(each: ast.expr) -> ast.expr:
        return Names(in_annotation, annotate).visit(unquoted(each))

    def in_annotation(each: ast.Name | ast.Attribute, around: frozenset[str]) -> ast.expr:
        name, _ = read_of(home, each)
        if name is not None and name.root in IMPORTED:
            found.append((name, around))
        return each

    Names(use, annotate).visit(node)  # which stays as it is, but for quotes in annotations
    tried = {id(x) for each in ast.walk(node) if isinstance(each, ast.Try) for x in ast.walk(each)}
    for each in ast.walk(node):
        if not isinstance(each, ast.Import | ast.ImportFrom):
            continue
        names = [a.name for a in each.names] if isinstance(each, ast.Import) else [each.module]
        for name in (Name(str(name)) for name in names):
            if name.root in JAX:
                found.append((name, frozenset()))
            elif name.root not in IMPORTED and (name.root in OWN or id(each) not in tried):
                raise _refused(Name(home.name), ast.unparse(each), "it outside of functions")
    for name, _ in found:
        if name.root not in OWN | JAX | IMPORTED:
            raise _refused(Name(home.name), f"{name}", f"{', '.join(sorted(OWN))} or transformers")
    return found


@functools.cache
def frame(name: Name) -> ast.stmt:
    """A definition; of a class what is not its methods, without JAX's decorators."""
    home = owner(name)
    node = home.defined[name.attr]
    if not isinstance(node, ast.ClassDef):
        return node
    node = copy.copy(node)
    node.decorator_list = [x for x in node.decorator_list if not _of_jax(ast.Expr(x), home)]
    node.body = [x for x in node.body if not isinstance(x, ast.FunctionDef)] or [ast.Pass()]
    return node


def _of_jax(node: ast.stmt, home: Module) -> bool:
    return any(name.root in JAX for name, _ in reads(node, home))


def in_jax(node: ast.stmt, home: Module) -> bool:
    """Whether a definition reads JAX, or another one that does as a whole."""
    todo, seen = [name for name, _ in reads(node, home)], set[Name]()
    while todo:
        name = todo.pop()
        if name.root in JAX:
            return True
        if name.root in OWN and name not in seen:
            seen.add(name)
            todo += _frame_reads(name)
    return False


@functools.cache
def _frame_reads(name: Name) -> list[Name]:
    return [each for each, _ in reads(frame(name), owner(name))]


@functools.cache
def kept(name: Name) -> ast.stmt:
    """A definition without what computes in JAX.

    Raises:
        InputError: nothing would be left, or a method that others of its class call.
    """
    home, node = owner(name), frame(name)
    if in_jax(node, home):
        raise _refused(name, "what needs JAX", "what does not")
    whole = home.defined[name.attr]
    if not isinstance(whole, ast.ClassDef) or not isinstance(node, ast.ClassDef):
        return node
    lost = [x for x in whole.body if isinstance(x, ast.FunctionDef) and in_jax(x, home)]
    if lost and home.name.startswith("converters."):
        raise _refused(name, f"{lost[0].name}, which needs JAX", "what does not")
    node = copy.copy(node)
    node.body = [x for x in whole.body if x not in lost] or [ast.Pass()]
    asked = {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute) and _own(x)}
    for method in lost:
        if method.name in asked:
            raise _refused(name, f"a call of {method.name}, which needs JAX", "what does not")
    return node


def _own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def named(hidden: dict[Name, set[str]], roots: Iterable[Name]) -> dict[Name, str]:
    """What each definition and import is called.

    Args:
        hidden: names -> what they can't be called.
        roots: those that keep their names.

    Raises:
        InputError: a root that can't.
    """
    called = {name: "" for name in hidden if " " in name.attr}
    taken = set(dir(builtins))
    rest = sorted(
        hidden.keys() - called.keys() - set(roots), key=lambda name: (name.root not in OWN, name)
    )
    for name in (*roots, *rest):
        *above, last = name.module.split(".")
        choices = [name.attr or last]
        if name not in roots:
            homes = ("_".join([*above[k:], last]) for k in range(len(above), -1, -1))
            choices += [f"{home}_{choices[0]}" for home in homes]
        free = (x for x in choices if x not in taken and x not in hidden[name])
        called[name] = next(free, "")
        if not called[name]:
            raise _refused(name, f"another {choices[0]}", "names that differ")
        taken.add(called[name])
    return called


def _import(name: Name, called: str) -> str:
    """The statement that imports what is in another package."""
    as_called = f" as {called}" if called != (name.attr or name.module) else ""
    if name.attr:
        return f"from {name.module} import {name.attr}{as_called}"
    return f"import {name.module}{as_called}"


def in_order(names: Iterable[str]) -> Iterator[Module]:
    """Modules, each behind those that it imports."""
    wanted, seen = set(names), set[str]()

    def visit(name: str) -> Iterator[Module]:
        if name in seen:
            return
        seen.add(name)
        home = module(name)
        assert home is not None
        for attr, target in home.imported.items():
            if target.root in OWN and (found := resolve(home, attr)) is not None:
                yield from visit(found.module)
        if name in wanted:
            yield home

    for name in sorted(wanted):
        yield from visit(name)


def unquoted(annotation: ast.expr) -> ast.expr:
    """An annotation without quotes around names, which `annotations` of __future__ makes idle."""

    class Unquoted(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.expr:
            return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node

        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            literal = isinstance(node.value, ast.Name) and node.value.id == "Literal"
            return node if literal else self.generic_visit(node)

    return Unquoted().visit(annotation)


def _written(node: ast.stmt, home: Module, called: dict[Name, str]) -> str:
    """A definition's source with the names of the file."""

    def replaced(lacking: str | None) -> Callable[..., ast.expr]:
        def use(each: ast.Name | ast.Attribute, around: frozenset[str]) -> ast.expr:
            name, attr = read_of(home, each)
            if name is None:
                base = each.value if isinstance(each, ast.Attribute) else each
                known = isinstance(base, ast.Name) and hasattr(builtins, base.id)
                return each if known or lacking is None else ast.Name(lacking)
            if name not in called:
                assert lacking is not None
                return ast.Name(lacking)
            found = ast.Name(called[name])
            return ast.Attribute(found, attr) if attr else found

        return use

    def annotate(each: ast.expr) -> ast.expr:
        return Names(replaced(called[ANY]), annotate).visit(unquoted(each))

    made = copy.deepcopy(node)
    if isinstance(made, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        new = called[Name(home.name, made.name)]
        made = Names(replaced(None), annotate).visit(made)
        made.name = new
    else:
        made = Names(replaced(None), annotate).visit(made)
    return ast.unparse(ast.fix_missing_locations(made))


def check(text: str) -> None:
    """Raises InputError if a file imports what it may not, or has a name of JAX."""
    tree = ast.parse(text)
    tried = {id(x) for each in ast.walk(tree) if isinstance(each, ast.Try) for x in ast.walk(each)}
    for node in ast.walk(tree):
        found = [node.id] if isinstance(node, ast.Name) else []
        if isinstance(node, ast.Import):
            found = [each.name.partition(".")[0] for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [str(node.module).partition(".")[0]]
        for name in found:
            allowed = isinstance(node, ast.Name) or name in IMPORTED or id(node) in tried
            if name in OWN | JAX | {"jnp", "nnx"} or not allowed:
                raise _refused(Name("bundle"), name, "none of it")


def _refused(name: Name, found: str, expected: str) -> InputError:
    fix = "write it in a module without JAX, or another way"
    return InputError(str(name), found=found, expected=expected, fix=fix)
