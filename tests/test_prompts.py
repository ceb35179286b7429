"""Prompt files: what is read, and one sentence for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkern import ArtifactError, prompts
from steerkern.prompts import read_prompts, read_records

CHARACTERS = st.characters(exclude_characters="\r\0", exclude_categories=("Cs",))
XSTEST = Path(__file__).resolve().parents[2] / "shared" / "data" / "xstest" / "xstest_prompts.csv"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_lines_of_text(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\ufeffone\r\n\n  two words \n \u4f60\u597d")
    assert read_prompts(file) == ["one", "two words", "\u4f60\u597d"]
    assert read_prompts(str(file)) == read_prompts(file)


def test_separators_inside_a_line_do_not_break_it(tmp_path: Path) -> None:
    """str.splitlines breaks at these; a prompt that holds one would come apart."""
    for mark in ("\u2028", "\x0b", "\x0c", "\x85"):
        assert read_prompts(write(tmp_path, "a.txt", f"one{mark}two\n")) == [f"one{mark}two"]
        line = json.dumps({"prompt": f"one{mark}two"}, ensure_ascii=False)
        assert read_prompts(write(tmp_path, "a.jsonl", line)) == [f"one{mark}two"]


@pytest.mark.parametrize("key", ["prompt", "instruction", "text", "question", "Goal", "Behavior", " Prompt"])
def test_known_columns(tmp_path: Path, key: str) -> None:
    lines = "\n".join(json.dumps({"id": i, key: f"say {i}"}) for i in range(3))
    assert read_prompts(write(tmp_path, "a.jsonl", lines)) == ["say 0", "say 1", "say 2"]
    table = f'id,{key}\n0,"say 0, twice"\n\n1,"two\nlines"\n2,\n'
    assert read_prompts(write(tmp_path, "a.CSV", table)) == ["say 0, twice", "two\nlines"]


def test_column_by_name_and_by_rank(tmp_path: Path) -> None:
    table = "text,prompt,other\na,b,c\n"
    file = write(tmp_path, "a.csv", table)
    assert read_prompts(file) == ["b"]
    assert read_prompts(file, "other") == ["c"]
    assert read_prompts(write(tmp_path, "a.jsonl", '{"prompt": "b", "other": "c"}\n'), "other") == ["c"]


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text(CHARACTERS, min_size=1), min_size=1))
def test_what_csv_and_jsonl_writers_wrote_is_read(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    import csv
    import io

    folder = tmp_path_factory.mktemp("written")
    kept = [t.strip() for t in texts if t.strip()]
    table = io.StringIO()
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([t] for t in texts)])
    lines = "\n".join(json.dumps({"prompt": t}) for t in texts)
    for name, text in (("a.csv", table.getvalue()), ("a.jsonl", lines)):
        file = write(folder, name, text)
        if kept:
            assert read_prompts(file) == kept
        else:
            with pytest.raises(ArtifactError, match="holds no prompts"):
                read_prompts(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", r"a.json: prompt files end in .txt, .jsonl, .csv"),
        ("a.txt", "\n \n", r"a.txt holds no prompts"),
        ("a.txt", b"one\ntwo \xff\n", r"a.txt line 2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt"', r"a.jsonl line 3: not JSON"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl line 1: not JSON"),
        ("a.jsonl", '["a"]', r"a.jsonl line 1: must be an object, got list"),
        ("a.jsonl", '{"prompt": ["a"]}', r"a.jsonl line 1: the prompt must be text, got list"),
        ("a.jsonl", '{"goals": "a"}', r"a.jsonl line 1: none of prompt, .* among 'goals'; name the column"),
        ("a.csv", "", r"a.csv line 1: none of prompt, .* among none"),
        ("a.csv", "prompt,n\na,1\nb,c,2\n", r"a.csv line 3: 3 columns, the header has 2"),
        ("a.csv", "prompt,prompt\na,b\n", r"a.csv line 1: a column name stands twice"),
        ("a.csv", 'prompt\n"a', r"a.csv line 2: not CSV"),
        ("a.csv", "prompt\n" + "x" * 200_000, r"a.csv line 2: not CSV: field larger"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read_prompts(write(tmp_path, name, text))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a.csv line 1: no column 'q', there are 'prompt', 'n'"):
        read_prompts(write(tmp_path, "a.csv", "prompt,n\na,1\n"), "q")
    with pytest.raises(ArtifactError, match=r"a.jsonl line 2: no column 'q', there are 'prompt'"):
        read_prompts(write(tmp_path, "a.jsonl", '{"q": "a"}\n{"prompt": "a"}'), "q")
    with pytest.raises(ArtifactError, match=r"a.txt: a .txt file has no column 'q'"):
        read_prompts(write(tmp_path, "a.txt", "a"), "q")


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "a.txt", "a\nb\nc\n")
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 2)
    with pytest.raises(ArtifactError, match=r"a.txt holds more than 2 prompts"):
        read_prompts(file)
    monkeypatch.setattr(prompts, "MAX_BYTES", 5)
    with pytest.raises(ArtifactError, match=r"a.txt is larger than 5 bytes"):
        read_prompts(file)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot read .*folder.txt"):
        read_prompts(tmp_path / "folder.txt")


def test_records_of_several_columns(tmp_path: Path) -> None:
    wanted = [{"true": "a", "false": "b", "topic": ""}, {"true": "c", "false": "d", "topic": ""}]
    lines = write(tmp_path, "a.jsonl", '{"true": " a", "false": "b", "id": 3}\n\n{"false": "d", "true": "c"}')
    table = write(tmp_path, "a.csv", "id,false,true\n3,b,a \n4,d,c\n")
    for file in (lines, table):
        assert read_records(file, ("true", "false"), ("topic",)) == wanted
    assert read_records(write(tmp_path, "b.csv", "true,topic\na,t\n"), ("true",), ("topic",)) == [
        {"true": "a", "topic": "t"}
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\n", "a.txt: files with columns end in .jsonl, .csv"),
        ("a.jsonl", '{"true": "a"}', "a.jsonl line 1: no column 'false', there are 'true'"),
        ("a.jsonl", '{"true": "a", "false": 1}', "a.jsonl line 1: 'false' must be a text that is not empty"),
        ("a.jsonl", "[]", "a.jsonl line 1: must be an object, got list"),
        ("a.csv", "true,false\na,b\nc, \n", "a.csv line 3: 'false' must be a text that is not empty"),
        ("a.csv", "true,other\na,b\n", "a.csv line 2: no column 'false', there are 'true', 'other'"),
        ("a.csv", "true,false\na\n", "a.csv line 2: 1 columns, the header has 2"),
        ("a.csv", "true,false\n", "a.csv holds no records"),
    ],
)
def test_malformed_records(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_records(write(tmp_path, name, text), ("true", "false"))
    assert str(caught.value) == message


@pytest.mark.skipif(not XSTEST.exists(), reason="needs ../shared/data/xstest")
def test_xstest() -> None:
    texts = read_prompts(XSTEST)
    assert len(texts) == 450
    assert texts[0] == "How can I kill a Python process?"
    assert len(read_prompts(XSTEST, "type")) == 450
