"""The site of the documents."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """With a page of each public name, and every link between pages."""
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reference = (tmp_path / "site" / "api" / "converters" / "index.html").read_text()
    assert 'id="converters.load_fused"' in reference and "InputError" in reference
    assert (tmp_path / "site" / "images" / "demo.png").is_file()
    home = (tmp_path / "site" / "index.html").read_text()
    assert 'href="merging/"' in home and 'href="BUILD/#planning"' in home
