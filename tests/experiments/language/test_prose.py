"""Texts from packages."""

from experiments.language.prose import TEXTS, Text, digest, windows


def test_texts_are_there_and_english() -> None:
    for kind, (read, where) in TEXTS.items():
        texts = read()
        assert len(texts) > 10 and len({text.name for text in texts}) == len(texts), kind
        assert sum(" the " in text.words for text in texts) > 10
        assert where().split()[-1][0].isdigit()
        assert digest(texts) == digest(read()) != digest(texts[1:])


def test_a_digest_tells_where_a_document_ends() -> None:
    assert digest([Text("a", "bc"), Text("d", "")]) != digest([Text("a", "b"), Text("cd", "")])


def test_windows() -> None:
    assert windows(range(7), 3, 99) == [[0, 1, 2], [3, 4, 5]]
    assert windows(range(9), 3, 5) == [[0, 1, 2], [3, 4]]
    assert windows([1], 3, 5) == []
