"""The layouts that docs/data-formats.md shows, and what cannot be learned as text."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from yuan2_core.conversation import Conversation, render_spans
from yuan2_core.errors import DatasetError
from yuan2_core.formats import RecordError, iterate_dataset, load_conversations, number_records, parts_of
from yuan2_core.json_records import read_records
from yuan2_core.raw_text import Document, render_document
from yuan2_core.sections import DataFile
from yuan2_core.tokenizer import Yuan2Tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs/data-formats.md"
EXAMPLES = re.findall(r"```(json|jsonl)\n(.*?)```\n\n```text\n(.*?)\n```", PAGE.read_text("utf-8"), re.DOTALL)
TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def text_of(item: Any, tokenizer: Yuan2Tokenizer) -> str:
    """What the model sees of a record, whole."""
    if isinstance(item, Document):
        sequences = render_document(item, tokenizer, 1000)
    else:
        assert isinstance(item, Conversation), str(item)
        sequences = render_spans(item, tokenizer, "efficient")
    (sequence,) = sequences
    return tokenizer.decode(sequence.ids.tolist())


def test_the_page_has_an_example_of_each_layout() -> None:
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize(("ending", "data", "shown"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_page_is_what_the_model_sees(
    ending: str, data: str, shown: str, tmp_path: Path, tokenizer: Yuan2Tokenizer
) -> None:
    file = tmp_path / f"data.{ending}"
    file.write_text(data, "utf-8")
    (item,) = iterate_dataset(file)
    assert text_of(item, tokenizer) == shown


UNLEARNABLE: list[tuple[Any, str]] = [
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[1].tool_calls",
    ),
    (
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]},
        "messages[1].function_call",
    ),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages[1].weight: 0: training.loss says"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        "messages[0].content[0]: only",
    ),
    (
        {"messages": [USER, ANSWER], "tools": [{"type": "function"}]},
        "tools: definitions of tools are learned",
    ),
    ({"messages": [USER]}, "messages: no user message with an answer"),
    ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role: unknown role 'critic'"),
]


@pytest.mark.parametrize(("record", "problem"), UNLEARNABLE, ids=[problem for _, problem in UNLEARNABLE])
def test_what_cannot_be_learned_is_named_with_its_line(record: Any, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(map(json.dumps, [{"messages": [USER, ANSWER]}, record])), "utf-8")
    good, wrong = iterate_dataset(file)
    assert isinstance(good, Conversation)
    assert isinstance(wrong, RecordError)
    assert f"{file}, record 2, {problem}" in str(wrong)
    assert str(wrong).endswith("(line 3)")


def test_openai_messages_of_text_are_learned_whatever_they_are_called(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "developer", "content": "Use tools."},
            {"role": "user", "content": [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]},
            {"role": "assistant", "content": "<call>", "weight": 1, "tool_calls": None},
            {"role": "tool", "content": "dry", "tool_call_id": "1"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": "[]",
    }
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record), "utf-8")
    (found,) = load_conversations(file)
    assert found.system == "Use tools."
    assert [tuple(turn) for turn in found.turns] == [("Rain?", "<call>"), ("dry", "No.")]


@pytest.mark.parametrize("lines", [[1, 2, 3], [1, 4, 5]], ids=["close", "apart"])
def test_the_line_of_a_record_is_known_in_arrays_and_in_lines(lines: list[int], tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    text = ["{}"] * 1 + [""] * (lines[1] - 2) + ["{}", "{}"]
    file.write_text("\n".join(text), "utf-8")
    assert [line for line, _ in read_records(file)] == lines
    commas = [part + ("," if part and place < len(text) - 1 else "") for place, part in enumerate(text)]
    file.write_text("[" + "\n".join(commas) + "]", "utf-8")
    assert [line for line, _ in read_records(file)] == lines


def test_gzip_is_told_by_its_content_and_its_damage_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([TALK] * 100).encode())
    file = tmp_path / "data.json"
    file.write_bytes(whole)
    assert len(load_conversations(file)) == 100
    file.write_bytes(whole[:-9])
    with pytest.raises(DatasetError, match=r"data\.json: damaged gzip file"):
        load_conversations(file)
    file.write_bytes(gzip.compress("caf\xe9".encode("latin-1")))
    with pytest.raises(DatasetError, match="not UTF-8"):
        load_conversations(file)


def test_a_directory_is_its_data_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.jsonl").write_text(json.dumps(TALK))
    (tmp_path / "deep/a.json.gz").write_bytes(gzip.compress(json.dumps([TALK]).encode()))
    (tmp_path / ".hidden/c.json").write_text("no data")
    (tmp_path / "dataset_info.md").write_text("no data")
    names = [Path(item.source or "").name for item in load_conversations(tmp_path)]
    assert names == ["b.jsonl", "a.json.gz"]


def test_files_have_a_format_and_a_weight_each(tmp_path: Path) -> None:
    for name in ("a.json", "b.txt"):
        (tmp_path / name).write_text(json.dumps([TALK] * 5))
    files = [DataFile(path="b.txt", format="fastchat", weight=2), DataFile(path="a.json", weight=0.5)]
    records = list(number_records(parts_of(tmp_path, files=files)))
    assert [record.times for record in records] == [2] * 5 + [0, 1, 0, 1, 0]
    assert {record.layout for record in records} == {"fastchat"}


@pytest.mark.parametrize("path", ["", "/a", "a/", "a/../b", "../b"])
def test_a_file_of_a_data_set_stays_below_its_directory(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        DataFile(path=path)


def test_plain_text_is_told_from_json_and_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yuan2_core.formats.TEXT_PIECE", 8)
    file = tmp_path / "book.txt"
    file.write_text("one two\nthree\nfour\n", "utf-8")
    found = list(iterate_dataset(file))
    assert [item.text for item in found if isinstance(item, Document)] == ["one two\n", "three\nfour\n"]
    file.write_text(json.dumps([TALK]))
    assert len(load_conversations(file)) == 1
    assert isinstance(next(iterate_dataset(file, "text")), Document)
    with pytest.raises(DatasetError, match=r"book\.txt: raw text, where conversations are wanted"):
        load_conversations(file, "text")


@pytest.mark.parametrize("length", [2, 3, 7, 1000])
def test_every_token_of_a_text_but_its_first_is_learned_exactly_once(
    length: int, tokenizer: Yuan2Tokenizer
) -> None:
    text = "Who are you? <eod> I am Yuan."
    whole = [*tokenizer.encode(text, structure=False), tokenizer.eod_id]
    pieces = render_document(Document(text), tokenizer, length)
    learned = [token for piece in pieces for token in piece.ids.tolist()[1:]]
    assert learned == whole[1:]
    assert all(2 <= len(piece.ids) <= length for piece in pieces)
    assert all(piece.learned.tolist() == [[0, len(piece.ids)]] for piece in pieces)
