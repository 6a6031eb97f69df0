"""The static checks, and facts about the tree that no linter knows."""

import ast
import functools
import importlib
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import grimp
import pytest

import vfjax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vfjax", "converters", "experiments")
MAX_LINES = 500
MACHINE_PATHS = tuple(f"/{name}/".encode() for name in ("work", "root"))
UNTRACKED = {"__pycache__", "build", "dist", "outputs"}

CHECKS = {
    "codespell": ["-m", "codespell_lib"],
    "ruff check": ["-m", "ruff", "check"],
    "ruff format": ["-m", "ruff", "format", "--check"],
    "mypy": ["-m", "mypy"],
    "import-linter": ["-c", "from importlinter.cli import lint_imports_command as c; c()"],
}


@functools.cache
def files() -> list[Path]:
    """Files of the repository: what git does not ignore; outside a checkout, what it would not."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            [*command, "--exclude-standard"], capture_output=True, check=True, text=True
        ).stdout
        paths = [ROOT / name for name in listing.split("\0") if name]
    else:
        paths = list(walk(ROOT))
    return sorted(p for p in paths if p.is_file())


def walk(folder: Path) -> list[Path]:
    """Files under a folder, without environments, caches and build products."""
    found: list[Path] = []
    for path in folder.iterdir():
        if not path.is_dir():
            found.append(path)
        elif not (
            path.name in UNTRACKED
            or path.name.endswith(".egg-info")
            or (path.name.startswith(".") and path.name != ".ci")
            or (path / "pyvenv.cfg").exists()
        ):
            found += walk(path)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_static_check(name: str) -> None:
    done = subprocess.run(
        [sys.executable, *CHECKS[name]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}{done.stderr}"


def test_no_import_circle() -> None:
    """Imports for type checkers alone count too, and so do those inside functions."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert {"vfjax.merge", "converters.fuse", "experiments.run"} <= graph.modules
    circles = set()
    for module in graph.modules:
        above, below = graph.find_downstream_modules(module), graph.find_upstream_modules(module)
        if circle := above & below:
            circles.add(frozenset(circle | {module}))
    assert not circles, [sorted(circle) for circle in circles]


def test_files_name_no_machine_path() -> None:
    assert files()
    wrong = [
        f"{path.relative_to(ROOT)}: {text.decode()}"
        for path in files()
        for text in MACHINE_PATHS
        if text in path.read_bytes()
    ]
    assert not wrong


def test_python_files_are_short() -> None:
    python = [p for p in files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in PACKAGES]
    assert {p.relative_to(ROOT).parts[0] for p in python} == set(PACKAGES)
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python}
    assert not {name: n for name, n in lines.items() if n > MAX_LINES}


def test_names_are_not_glued_with_a_zero_byte() -> None:
    sources = [p for p in files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in PACKAGES]
    assert [str(p) for p in sources if "\\0" in p.read_text() or "\\x00" in p.read_text()] == []


ELSEWHERE = {
    # Names of tensors, and keys of configs: every table and format by one set of tests
    # (converters/test_every_tensor.py, test_keys*.py, test_published*.py, test_families.py).
    "converters/params": "clip convnext dino dinov2 dinov3 gemma idefics internlm2 internvit "
    "llama mistral mixtral mlp phi phi3 qwen siglip",
    "converters/formats": "comm dense_connector llava llava_next mini_gemini slime visionfuse",
    # By what opens, adapts, fuses and prints folders: test_load.py, test_adapters*.py,
    # test_mergekit*.py, test_vocabulary.py, test_files.py, test_fit.py, test_signalled.py.
    "converters": "__main__ adapted adapter_config chat fingerprint folder fusion "
    "lmms_eval_models lora processor registry tokenizer tokenizer_union towers values",
    "converters/files": "checksums others shards",
    # By the contract's test (test_toy.py) and by recordings of the authors' code.
    "vfjax/architectures": "base boxes combine dense_connector llava llava_next "
    "mini_gemini mlp slime tapped",
    "vfjax/vision/encoders": "clip dinov2 internvit siglip",
    # By what draws with them and reports: experiments/tasks.
    "vfjax/analysis": "draw report search",
    "vfjax/eval": "data extras judge predict videoqa",
    # By the model's tests (test_model.py), each against its twin in vfjax on one folder.
    "converters/hf": "branch config convnext llava plain state written",
    # By the engine's and the methods' tests as a whole, against mergekit and closed forms.
    "vfjax/merge": "parse tensors",
    "vfjax/merge/engine": "account kernels operation reductions",
    "vfjax/merge/methods": "ram requests sphere",
    # Used throughout.
    "vfjax": "atomic errors rows",
    "vfjax/fusion": "segments shard",
    "vfjax/llm": "cache watch",
    "vfjax/nn": "lora",
    "vfjax/text": "chat tokenizer",
    "vfjax/train": "flops",
    # Glue: by the command line's tests.
    "experiments": "signals stderr_filter",
    "experiments/bench": "basic buckets common costs gpu llamas load merge saving train",
    "experiments/family": "encoders language members optim study",
    "experiments/serve": "pictures refused request",
    "experiments/tasks": "chips common demo fuse generate programs seen serve shapes",
}
"""Folder -> modules that no test file is named after; it only shrinks."""


def test_tests_mirror_modules() -> None:
    """A module has a test file of its name, or is in `ELSEWHERE`."""
    lacking: dict[str, set[str]] = {}
    python = [p.relative_to(ROOT) for p in files() if p.suffix == ".py"]
    modules = [p for p in python if p.parts[0] in PACKAGES and p.stem != "__init__"]
    for path in (p for p in modules if "configs" not in p.parts):
        if not (ROOT / "tests" / path.parent / f"test_{path.name}").is_file():
            lacking.setdefault(path.parent.as_posix(), set()).add(path.stem)
    known = {folder: set(names.split()) for folder, names in ELSEWHERE.items()}
    new = {folder: names - known.get(folder, set()) for folder, names in lacking.items()}
    assert {folder: names for folder, names in new.items() if names} == {}, "add a test file"
    done = {folder: names - lacking.get(folder, set()) for folder, names in known.items()}
    assert {folder: names for folder, names in done.items() if names} == {}, "shorten ELSEWHERE"


LONG = {
    "tests/mutate.py": 641,
    "tests/vfjax/data/test_pipeline.py": 585,
}
"""Files of tests that are longer than MAX_LINES -> by how much, at most; it only shrinks."""


def test_test_files_are_short() -> None:
    tests = [p for p in files() if p.suffix == ".py" and p.is_relative_to(ROOT / "tests")]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in tests}
    assert {n: count for n, count in lines.items() if count > LONG.get(n, MAX_LINES)} == {}
    assert [name for name in LONG if lines.get(name, 0) <= MAX_LINES] == []


FOREIGN = {
    "_cache_size",  # JAX's count of a function's programs
    "_current_frames",
    "_exit",
    "_get_logits_processor",  # transformers'
    "_get_number_of_features",
    "_get_unpadded_features",
    "_src",
}
"""Private names of other libraries that tests read, as nothing public says the same."""


def private(name: object) -> bool:
    return isinstance(name, str) and name[:1] == "_" and name[:2] != "__" and name not in FOREIGN


def private_names(tree: ast.AST) -> list[str]:
    """Private names that a module imports or reads of others, code in its texts included."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [x.name for x in node.names if private(x.name)]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found += [] if own or not private(node.attr) else [node.attr]
        elif isinstance(node, ast.Call) and len(node.args) > 1:  # setattr, monkeypatch.setattr
            function, name = node.func, getattr(node.args[1], "value", None)
            called = getattr(function, "attr", getattr(function, "id", ""))
            found += [name] if called in ("setattr", "getattr") and private(name) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(
                rf"^from (?:{'|'.join(PACKAGES)})\S* import (_\w+)", node.value, re.M
            )
    return found


def test_tests_read_no_private_name() -> None:
    """What deserves a test is public."""
    tests = [p for p in files() if p.suffix == ".py" and p.is_relative_to(ROOT / "tests")]
    assert len(tests) > 100
    found = {str(p.relative_to(ROOT)): private_names(ast.parse(p.read_text())) for p in tests}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from vfjax.generate import (_decode)",
        "generate._decode(1)",
        "monkeypatch.setattr(generate, '_decode', None)",
        "run('from vfjax.generate import _decode')",
    ],
)
def test_private_names_are_seen(code: str) -> None:
    assert private_names(ast.parse(code)) == ["_decode"]


SHARED = {"__init__", "base", "boxes", "combine", "mlp"}
"""Modules of `vfjax.architectures` that are no family's."""


def classes_asked(tree: ast.AST) -> set[str]:
    """Names of classes that a module tells apart, by isinstance, issubclass or match."""
    found: set[str] = set()
    for node in ast.walk(tree):
        asked: ast.AST | None = node.cls if isinstance(node, ast.MatchClass) else None
        asks = isinstance(node, ast.Call) and getattr(node.func, "id", "")
        if isinstance(node, ast.Call) and asks in ("isinstance", "issubclass"):
            asked = node.args[1]
        for part in ast.walk(asked) if asked is not None else ():
            found.add(getattr(part, "attr", getattr(part, "id", "")))
    return found


def test_no_family_is_told_apart_outside_its_files() -> None:
    """What depends on a family, its architecture answers."""
    homes = {
        node.name: path.stem
        for path in (ROOT / "vfjax" / "architectures").glob("*.py")
        if path.stem not in SHARED
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert {"Llava", "Mining", "SliMEConfig"} <= homes.keys()
    wrong = {}
    for path in (p for p in files() if p.suffix == ".py"):
        package, *_ = where = path.relative_to(ROOT).parts
        own = path.parent.name in ("architectures", "formats")
        asked = classes_asked(ast.parse(path.read_text())) if package in PACKAGES else set()
        if found := [x for x in asked if x in homes and not (own and homes[x] == path.stem)]:
            wrong["/".join(where)] = found
    assert wrong == {}
    assert classes_asked(ast.parse("isinstance(x, a.Llava | Mining)")) >= {"Llava", "Mining"}


PUBLIC = {package: importlib.import_module(package) for package in ("vfjax", "converters")}
"""What users import."""


def names_of(package: ModuleType) -> list[str]:
    """Public names of a package but for its modules."""
    found = {name: x for name, x in vars(package).items() if not name.startswith("_")}
    return [name for name, x in found.items() if not isinstance(x, ModuleType)]


@pytest.mark.parametrize("package", PUBLIC.values(), ids=PUBLIC)
def test_help_lists_what_users_call(package: ModuleType) -> None:
    """Each name in an example or said; a few screens in all."""
    assert package.__doc__ is not None
    examples = re.findall(r"((?:^    .*\n)+)", package.__doc__, re.MULTILINE)
    for example in examples:
        ast.parse(textwrap.dedent(example))
    said = {name: re.search(rf"\b{name}\b", package.__doc__) for name in names_of(package)}
    assert len(said) > 8
    assert [name for name, found in said.items() if found is None] == []
    assert len(pydoc.plain(pydoc.render_doc(package)).splitlines()) < 120


@pytest.mark.parametrize("package", PUBLIC.values(), ids=PUBLIC)
def test_public_functions_name_their_arguments(package: ModuleType) -> None:
    for name in names_of(package):
        function = getattr(package, name)
        if inspect.isfunction(function):
            kinds = {x.kind for x in inspect.signature(function).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def documents() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


def test_names_in_documents_are_there() -> None:
    """As README and docs write them: `vfjax.generate`, `converters.load`."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        re.findall(r"\b(?:vfjax|converters)(?:\.[A-Za-z_]\w*)+", path.read_text()) for path in pages
    ]
    names = {name for each in found for name in each}
    assert len(names) > 10
    for name in names:
        found: object = importlib.import_module(name.partition(".")[0])
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                assert isinstance(found, ModuleType), name
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


BARE = {"vfjax": 1, "converters": 3, "experiments": 1}
"""Package -> most arguments and results of its functions that may be a bare `Any`."""


def test_signatures_say_their_types() -> None:
    counts = dict.fromkeys(BARE, 0)
    for path in files():
        package = path.relative_to(ROOT).parts[0]
        if package in BARE and path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    a = node.args
                    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
                    types = [node.returns, *(x.annotation for x in given if x is not None)]
                    counts[package] += sum(isinstance(x, ast.Name) and x.id == "Any" for x in types)
    assert counts["converters"] > 0
    over = {name: count for name, count in counts.items() if count > BARE[name]}
    assert not over, "say what the values are"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_hold() -> None:
    """Between documents, with what they point to within a page."""
    broken = []
    for path in documents():
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", path.read_text()):
            name, _, part = link.partition("#")
            target = path.parent / name if name else path
            if not target.exists() or (part and part not in anchors(target.read_text())):
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken


def test_readme_is_short() -> None:
    """A newcomer reads it whole; everything else is in docs."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_commands_are_make_targets() -> None:
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(commands) <= set(targets)


def test_pyproject_and_package_agree_on_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vfjax.__version__
    assert f"[{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_checkout_does_not_shadow_its_editable_install(tmp_path: Path) -> None:
    """Where the working directory is its parent, `vfjax` is not the checkout's folder."""
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "vfjax"
    for name in ("vfjax", "converters", "experiments"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, checkout / name)
    code = "import sys; from setuptools.build_meta import build_editable as b; b(sys.argv[1])"
    (tmp_path / "dist").mkdir()
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "dist"],
        cwd=checkout,
        capture_output=True,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import site, sys; site.addsitedir(sys.argv[1]); import vfjax; print(vfjax.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, tmp_path / "site"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(checkout / "vfjax" / "__init__.py")
