"""Files as they are: what each kind of reader makes of one, and what it refuses."""

import json
import os

import pytest
from datasets.exceptions import DatasetsError

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.cli.arguments import DataArguments
from hf_lookbehind.programs.data import sources, texts
from hf_lookbehind.programs.data.rows import read_rows
from hf_lookbehind.programs.data.texts import TextDataArguments

MANY = 10_400  # more than a reader takes at once


def columns(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_rows(path, str(tmp_path / "cache"))
    return {column: rows[column][:] for column in rows.column_names}


def lines(rows):
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    "name, content, text, label",
    [
        ("a.csv", "text,label\ngood,1\nbad,0\n", ["good", "bad"], ["1", "0"]),
        ("a.csv", "text,label\n005,01\n1e5,1.0\n", ["005", "1e5"], ["01", "1.0"]),
        ("a.csv", "text,label\nNA,null\n,nan\n", ["NA", None], ["null", "nan"]),
        ("a.csv", 'text,label\n"a, b\nc ""d""",1\n\n e ,2\n', ['a, b\nc "d"', " e "], ["1", "2"]),
        ("a.csv", "\ufeff text, label\r\ngood,1\r\n", ["good"], ["1"]),
        ("a.csv", 'text;label\n"a;b";3,5\n', ["a;b"], ["3,5"]),
        ("a.csv", "text\tlabel\na, b\t1\n", ["a, b"], ["1"]),
        ("a.csv", "text,label\n" + "x" * 200_000 + ",1\n", ["x" * 200_000], ["1"]),
        ("a.tsv", 'text\tlabel\n"a, b\t1\n', ['"a, b'], ["1"]),
        ("a.json", '{"text": ["a", "b"], "label": [0, 1]}', ["a", "b"], [0, 1]),
        ("a.json", '{"text": {"3": "a", "7": "b"}, "label": {"3": 0, "7": 1}}', ["a", "b"], [0, 1]),
        ("a.json", '[\n{"text": "a", "label": 0},\n{"text": "2020-01-01"}]', ["a", "2020-01-01"], [0, None]),
        ("a.jsonl", '{"text": "a", "label": 0}\n\n{"label": 1.5}\n', ["a", None], [0, 1.5]),
        ("a.jsonl", '{"text": "a", "label": [0]}', ["a"], [[0]]),
    ],
)
def test_fields_are_what_the_file_says(tmp_path, name, content, text, label):
    assert columns(tmp_path, name, content) == {"text": text, "label": label}


def test_a_column_has_one_type_in_the_whole_file(tmp_path):
    """Also where its first rows would have another."""
    late = lambda first, last: [first if i < 10_000 else last for i in range(MANY)]  # noqa: E731
    spelled = {"a": late("ab", "01"), "b": late("good film", "005"), "c": late("1", "1.5"), "d": late("1", "other")}
    rows = "".join(",".join(row) + "\n" for row in zip(*spelled.values(), strict=True))
    assert columns(tmp_path, "a.csv", "a,b,c,d\n" + rows) == spelled
    typed = {"a": late(1, 1.5), "b": late(None, "x"), "c": late([], ["a"]), "d": late(1, "other")}
    rows = lines(dict(zip(typed, row, strict=True)) for row in zip(*typed.values(), strict=True))
    assert columns(tmp_path, "a.jsonl", rows) | {"d": typed["d"]} == typed
    part = sources.take_split(
        {"train": read_rows(tmp_path / "a.jsonl", str(tmp_path / "cache"))}, "train", "train_split"
    )
    assert part.column("d") == typed["d"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", 'text,label\n"a\nb",1\n\nc, d,2\n', "line 5 has 3 fields, and the header 2: a field that holds ','"),
        ("a.csv", "text;label\na;b;1\n", "line 2 has 3 fields, and the header 2: a field that holds ';'"),
        ("a.csv", "text,label\na,1\nb\n", "line 3 has 1 of the 2 fields"),
        ("a.csv", "text,label,text \na,1,b\n", "its header has the column 'text' twice"),
        ("a.csv", 'text,label\na,1\n"b,1\nc,2\n', "line 3 opens a quotation that is never closed"),
        ("a.csv", 'text,label\n"a"b,1\n', "line 2: ',' expected"),
        ("a.csv", b"text,label\na,1\n\xe9,1\n", "line 3 is not UTF-8 .byte 0xe9.: save the file as UTF-8"),
        ("a.csv", "text,label\n", "holds no example"),
        ("a.csv", "\n \n", "holds no example"),
        ("a.tsv", "text\tlabel\na\n", "line 2 has 1 of the 2 fields"),
        ("a.json", '{"text": ["a", "b"], "label": [0]}', "different lengths: 'text' has 2, 'label' has 1"),
        ("a.json", '[["a", 0]]', "row 0 is no object"),
        ("a.json", "3", "it holds int 3: rows are needed"),
        ("a.json", "[]", "holds no example"),
        ("a.jsonl", '{"text": "a"}\n{"text":\n', "line 2: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2 is no object"),
        ("a.txt", b"\xe9", "line 1 is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, name, content, message):
    with pytest.raises(DatasetsError) as raised:
        columns(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        raise raised.value.__cause__


def test_the_cache_knows_a_file_by_what_it_holds(tmp_path):
    found = []
    for content in ("text\na\n", "text\nb\n"):
        (tmp_path / "a.csv").write_text(content)
        os.utime(tmp_path / "a.csv", (1e9, 1e9))
        found.append(read_rows(tmp_path / "a.csv", str(tmp_path / "cache"))["text"][:])
    assert found == [["a"], ["b"]]


def test_files_of_several_kinds_are_one_split(tmp_path):
    """A CSV file tells no types, a JSON file does: what is text in one of them is so in all."""
    (tmp_path / "a.csv").write_text("text,label\na,0\n")
    (tmp_path / "b.jsonl").write_text('{"text": "b", "label": 1}')
    (tmp_path / "c.jsonl").write_text('{"text": "c", "label": 0.5}')

    def labels_of(*names):
        args = TextDataArguments(train_file=[str(tmp_path / name) for name in names])
        return texts.load_texts(args, cache_dir=str(tmp_path / "cache"))["train"]["label"][:]

    assert labels_of("a.csv", "b.jsonl") == ["0", "1"] and labels_of("b.jsonl", "c.jsonl") == [1.0, 0.5]


def test_a_folder_of_files_is_read_as_files_are(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\n005,1\n")
    (tmp_path / "data" / "test.csv").write_text("text,label\na, b,1\nc, d,1\n")
    args, cache = DataArguments(dataset_name=str(tmp_path / "data")), str(tmp_path / "cache")
    with pytest.raises(InputError, match="--dataset_name '.*data' cannot be read: test.csv: line 2 has 3 fields"):
        sources.load_splits(args, built_in={}, cache_dir=cache)
    (tmp_path / "data" / "test.csv").unlink()
    assert sources.load_splits(args, built_in={}, cache_dir=cache)["train"]["text"][:] == ["005"]
