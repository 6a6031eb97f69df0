"""What the config files say of their keys."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import experiments.configs.train as configs

FILES = sorted(Path(configs.__file__).parent.glob("*.py"))


def undescribed(text: str) -> list[str]:
    """Keys of a file's dicts of settings without a comment in their lines or in the line above.

    A dict of settings is what `ConfigDict` is given, and what the function `stage` returns; what
    stands inside of one key's value is that key's.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    above = {n for n in lines if text.splitlines()[n - 1].lstrip().startswith("#")}
    dicts = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigDict":
            dicts += node.args
        if isinstance(node, ast.FunctionDef) and node.name == "stage":
            dicts += [x.value for x in node.body if isinstance(x, ast.Return)]
    out = []
    for each in dicts:
        for key, value in zip(each.keys, each.values, strict=True):
            own = lines & set(range(key.lineno, value.end_lineno + 1)) if key else {0}
            if not own and key.lineno - 1 not in above and ast.literal_eval(key) != "task":
                out.append(ast.literal_eval(key))
    return out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_says_what_it_is(file):
    text = file.read_text()
    assert "ConfigDict(" in text
    assert not undescribed(text)


def test_a_key_without_a_comment_is_found():
    text = 'ConfigDict({\n"task": "t",\n"a": 1,  # said\n# said\n"b": {"c": 2},\n"d": "# no"})\n'
    assert undescribed(text) == ["d"]
