"""Files as people write them: ends of lines, byte order marks, pandas' numbers, many options."""

import base64
import csv
import json
from pathlib import Path

import pytest

from vfjax import InputError
from vfjax.eval import Data, get_benchmark, read
from vfjax.eval.data import integer, number, read_json, read_lines, read_table

BREAKS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")
PICTURE = base64.b64encode(bytes(60)).decode()


@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_tables_are_read_as_by_csv(tmp_path: Path, delimiter: str, end: str, mark: bool) -> None:
    """Python's csv module on an open file; not a character more ends a line."""
    names = ("index", "question", "A")
    rows = [{"index": str(k), "question": f"a{c}b", "A": f"x{c}"} for k, c in enumerate(BREAKS)]
    rows += [{"index": "9", "question": 'in "quotes"\r\nand\nlines, of\ttabs', "A": "y"}]
    path = tmp_path / "table"
    with path.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
        file.write(end.join(f"{c}{delimiter}{c}q{delimiter}" for c in BREAKS) + end)  # unquoted
    with path.open(encoding="utf-8-sig", newline="") as file:
        expected = list(csv.DictReader(file, delimiter=delimiter))
    assert read_table(path, delimiter) == expected
    assert expected[: len(rows)] == rows and len(expected) == len(rows) + len(BREAKS)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_with_odd_characters(tmp_path: Path, mark: bytes) -> None:
    rows = [{"text": f"a{c}b"} for c in BREAKS]
    for name, text in (
        ("a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)),
        ("a.json", json.dumps(rows, ensure_ascii=False)),
    ):
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_lines(tmp_path / name) == rows
    assert read_json(tmp_path / "a.json") == rows


def test_a_row_of_too_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2,,\n1,2,3\n")
    with pytest.raises(InputError, match=r"a.csv row 2: found 3 columns, 2 names, expected"):
        read_table(path, ",")
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(InputError, match=r"a.csv: found two columns 'a', expected"):
        read_table(path, ",")


@pytest.mark.parametrize(
    ("value", "found"),
    [(7, 7), ("7", 7), ("7.0", 7), (" 7", 7), ("1e3", 1000), (7.0, 7), ("-2", -2), (2**60 + 1,) * 2]
    + [(str(2**60 + 1), 2**60 + 1)],
)
def test_whole_numbers(value, found) -> None:
    assert integer(value, "here", "index") == found


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "1.5", 1.5, None, True, [1], "1,000"])
def test_no_whole_number(value) -> None:
    with pytest.raises(InputError, match=r"here: found index .* number; use the file"):
        integer(value, "here", "index")
    if value not in ("1.5", 1.5):
        with pytest.raises(InputError):
            number(value, "here", "index")


def mmbench(folder: Path, rows: list[dict[str, str]]) -> Data:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "dev.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return Data(folder)


def test_mmbench_with_many_options(tmp_path: Path) -> None:
    """Seven options, an index that pandas made a float, a rotation that shares the picture."""
    words = ("red", "blue", "green", "white", "black", "grey", "pink")
    options = dict(zip("ABCDEFG", words, strict=True))
    row = {"question": "Which\u2028colour?", **options, "answer": "G", "category": "c"}
    data = mmbench(
        tmp_path,
        [
            {"index": "1.0", "image": PICTURE, **row},
            {"index": "1000001.0", "image": "1.0", **row},
            {"index": "2", "image": PICTURE, **row, "F": "", "G": "", "answer": "B"},
        ],
    )
    benchmark = get_benchmark("mmbench")
    questions = read(benchmark, data, dict(benchmark.options), None)
    assert [q.id for q in questions] == ["1", "1000001", "2"]
    assert [q.cluster for q in questions] == ["1", "1", "2"]
    assert "Which\u2028colour?" in questions[0].prompt and "\nG. pink\n" in questions[0].prompt
    assert list(questions[2].extra["options"]) == list("ABCDE")
    assert len({q.images for q in questions}) == 1
    found = benchmark.score(questions, ["G", "pink", "B"], dict(benchmark.options))
    assert found["circular accuracy"].value == 100
    with pytest.raises(
        InputError, match=r"row 1: found answer 'H', expected one of A, B, C, D, E,"
    ):
        read(
            benchmark,
            mmbench(tmp_path, [{"index": "1", "image": PICTURE, **row, "answer": "H"}]),
            dict(benchmark.options),
            None,
        )


def test_all_options_are_asked(tmp_path: Path) -> None:
    """ScienceQA, SEED-Bench and MMVP with more options than usual."""
    words = [f"word {k}" for k in range(12)]
    problems = {"7": {"question": "Q", "choices": words, "answer": 11.0, "split": "test"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    benchmark = get_benchmark("scienceqa")
    (question,) = read(benchmark, Data(tmp_path), dict(benchmark.options), None)
    assert "\nL. word 11\n" in question.prompt and question.answers == ("L",)
    assert benchmark.score([question], ["L"], {})["accuracy"].value == 100

    row = {"question_id": 1, "question": "Q", "answer": "F", "data_id": "a.jpg"}
    row |= {f"choice_{letter}": f"word {letter}" for letter in "abcdef"}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [row]}))
    benchmark = get_benchmark("seed")
    (question,) = read(benchmark, Data(tmp_path / "SEED-Bench.json"), {}, None)
    assert "\nF. word f\n" in question.prompt
    assert benchmark.score([question], ["f"], {})["accuracy"].value == 100

    letters = "abcdefghijk"
    options = " ".join(f"({letter}) word(s) {letter}" for letter in letters)
    with (tmp_path / "Questions.csv").open("w", newline="") as file:
        names = ("Index", "Question", "Options", "Correct Answer")
        csv.writer(file).writerows([names, ("1.0", "Q", options, "(k)")])
    benchmark = get_benchmark("mmvp")
    (question,) = read(benchmark, Data(tmp_path / "Questions.csv"), dict(benchmark.options), None)
    assert question.extra["options"] == {c.upper(): f"word(s) {c}" for c in letters}
    assert (question.id, question.answers) == ("1", ("K",))


def test_boxes_and_pictures_by_number(tmp_path: Path) -> None:
    """Numbers that stand as text are numbers; what is none is named."""
    row = {"img_id": "COCO_train2014_1_0", "sents": "a dog", "width": "40", "height": 30}
    rows = [{**row, "bbox": ["1.0", 2, "3", 4]}, {**row, "bbox": ["nan", 2, 3, 4]}]
    benchmark, file = get_benchmark("refcoco"), tmp_path / "refcoco.json"
    file.write_text(json.dumps(rows[:1]))
    (question,) = read(benchmark, Data(file), dict(benchmark.options), None)
    assert question.extra == {"box": (1.0, 2.0, 4.0, 6.0), "size": (40.0, 30.0)}
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"row 1: found bbox 'nan', expected a number"):
        read(benchmark, Data(file), dict(benchmark.options), None)

    asked = {"questions": [{"question_id": 1, "image_id": 7.0, "question": "Q"}]}
    file = tmp_path / "v2_OpenEnded_mscoco_questions.json"
    file.write_text(json.dumps(asked))
    (question,) = read(get_benchmark("vqav2"), Data(file), {}, None)
    assert question.images[0].name == "COCO_val2014_000000000007.jpg"


def test_answer_lengths() -> None:
    """LLaVA's model_vqa_loader.py: 128; its model_vqa{,_science,_mmbench}.py and MMVP's: 1024."""
    loader = ("vqav2", "gqa", "vizwiz", "textvqa", "pope", "mme", "seed")
    long = ("scienceqa", "mmbench", "mmvet", "llava_wild", "llava", "mmvp")
    assert {get_benchmark(name).max_new_tokens for name in loader} == {128}
    assert {get_benchmark(name).max_new_tokens for name in long} == {1024}
