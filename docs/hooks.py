"""The site's pages that lie elsewhere in the repository, links to them, and the reference.

mkdocs calls these functions by their names (mkdocs.org/dev-guide/plugins).
"""

import importlib
import posixpath
import re
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "index.md": "README.md",
    **{name: name for name in ("BUILD.md", "MODELS.md", "CONTRIBUTING.md", "CHANGELOG.md")},
    "family.md": "experiments/family/README.md",
    "real.md": "experiments/family/REAL.md",
    "language.md": "experiments/language/README.md",
}
"""Page -> its file in the repository."""

PACKAGES = ("vfjax", "converters")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, the pictures that they show, and a page of each package's public names."""
    for page, name in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
        for link in re.findall(r"!\[[^]]*\]\(([^):]+)\)", (ROOT / name).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
            if not path.startswith("docs/"):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for package in PACKAGES:
        module = importlib.import_module(package)
        named = {name: x for name, x in vars(module).items() if not name.startswith("_")}
        names = sorted(name for name, x in named.items() if not isinstance(x, ModuleType))
        parts = "\n\n".join(f"::: {package}.{name}" for name in names)
        files.append(
            File.generated(config, f"api/{package}.md", content=f"# {package}\n\n{parts}\n")
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links between files of the repository at the site's pages.

    A file that is no page is named without a link.
    """
    own = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {name: page for page, name in ELSEWHERE.items()}

    def moved(match: re.Match[str]) -> str:
        text, link, part = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
        target = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return text.lstrip("!").strip("[]")
        start = posixpath.dirname(page.file.src_uri)
        return f"{text}({posixpath.relpath(target, start or '.')}{part})"

    return re.sub(r"(!?\[[^]]*\])\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)
