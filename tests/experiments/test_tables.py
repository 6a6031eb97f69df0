"""The documents' tables are those of their JSON files."""

import pytest

from experiments import tables


def test_documents_say_what_their_measurements_left(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_stands_in_a_document():
    text = "".join(path.read_text() for path in tables.DOCUMENTS)
    assert all(f"<!-- {name} -->\n" in text for name in tables.TABLES)


def test_another_figure_is_noticed():
    text = next(
        path.read_text() for path in tables.DOCUMENTS if "<!-- merge -->" in path.read_text()
    )
    row = next(line for line in tables.merge() if line.startswith("| linear"))
    other = text.replace(row, row.replace(" s ", "9 s "))
    assert other != text and tables.filled(other) == text


def test_a_mark_without_a_table():
    with pytest.raises(KeyError, match="other"):
        tables.filled("<!-- other -->\n<!-- /other -->")
