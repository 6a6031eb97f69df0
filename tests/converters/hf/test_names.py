"""Which names of a module a piece of code reads."""

import ast

import pytest

from converters.hf.names import Names, module

CODE = (
    ("def f(a, b=one): c = a; return [two(x) for x in three(a) if c]", "one two three"),
    ("def f(x: G = one) -> G:\n  y: G = x\n  return lambda z=two: z + three", "one two three"),
    ("class C(one):\n  a = two\n  b = a\n  @three\n  def m(self): return a", "one two three a"),
    ("def f():\n  import x\n  try: x.y\n  except one as e: return e", "one"),
    ("def f():\n  with two as z: return z", "two"),
    ("def f():\n  def g(): return h\n  h = one\n  return g, f", "one f"),
    ("def f(v):\n  match v:\n    case {'a': b, **rest}: return b, rest", ""),
    ("def f(v):\n  match v:\n    case [*c]: return c, one", "one"),
    ("x = [x for x in x if (y := x.one)]", "x y"),
    ("def f(tiles): return tiling.tiles(tiles), tiles.shape", "tiling.tiles"),
)
"""Code, and the names in it that are its module's."""


@pytest.mark.parametrize(("code", "expected"), CODE)
def test_free_names(code: str, expected: str):
    found = []

    def use(node: ast.Name | ast.Attribute, around: frozenset[str]) -> ast.expr:
        found.append(ast.unparse(node))
        return node

    Names(use, lambda annotation: annotation).visit(ast.parse(code).body[0])
    assert set(found) == set(expected.split())


def test_modules_are_found_by_name():
    found = module("vfjax.architectures.llava")
    assert found is not None and {"Llava", "Projector"} <= set(found.defined)
    assert str(found.imported["np"]) == "numpy"
    assert str(found.imported["cells"]) == "vfjax.architectures.boxes.cells"
    assert module("vfjax.nothing") is None
