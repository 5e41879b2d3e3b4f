"""Data files of every layout, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan2_core import json_records
from yuan2_core.conversation import Conversation, Turn
from yuan2_core.errors import DatasetError
from yuan2_core.formats import RecordError, iterate_dataset, load_conversations, read_dataset
from yuan2_core.json_records import read_records


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


GOOD = {"id": "a1", "conversations": [human("Hi"), gpt("Hello")]}
OTHER = {
    "id": "a2",
    "system": "Be kind.",
    "conversations": [human("你好"), gpt("你好！"), human("谢谢"), gpt("不客气")],
}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
BELLE = {
    "instruction": "Human:你好\nAssistant:你好！\nHuman:写诗：\n\n要短\nAssistant:",
    "input": "",
    "output": "床前",
}


def save(directory: Path, content: Any, name: str = "data.json") -> Path:
    """Write JSON, or text and bytes as they are."""
    file = directory / name
    data = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
    file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return file


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    "content",
    [
        [GOOD, OTHER],
        [[GOOD, OTHER]],
        [[GOOD], [OTHER]],
        lines(GOOD, OTHER),
        "\n\n" + lines(GOOD) + "\r\n  \n" + lines(OTHER).strip(),
        json.dumps([GOOD, OTHER], indent=4),
        "\ufeff" + json.dumps([GOOD, OTHER]),
        "\ufeff" + lines(GOOD, OTHER),
    ],
    ids=["array", "array-in-array", "arrays", "lines", "blank-lines", "indented", "bom-array", "bom-lines"],
)
def test_fastchat_is_read_from_every_layout_in_file_order(content: Any, tmp_path: Path) -> None:
    file = save(tmp_path, content)
    expected = [
        Conversation.of_turns([Turn("Hi", "Hello")], source=str(file), record=1),
        Conversation.of_turns(
            [Turn("你好", "你好！"), Turn("谢谢", "不客气")], "Be kind.", source=str(file), record=2
        ),
    ]
    assert load_conversations(file) == expected
    assert load_conversations(str(file), format="fastchat") == expected


def test_alpaca_becomes_one_turn_with_the_alpaca_prompt(tmp_path: Path) -> None:
    without = {"instruction": "Say {input}.", "input": "", "output": "Hi"}
    first, second, third = load_conversations(
        save(tmp_path, [ALPACA, without, {"instruction": "Go", "output": "1"}])
    )
    assert first.turns == (
        Turn(
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n"
            "### Input:\n1 2\n\n### Response:",
            "3",
        ),
    )
    assert second.turns[0].question == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {input}.\n\n### Response:"
    )
    assert "### Input" not in third.turns[0].question


def test_belle_is_split_into_turns(tmp_path: Path) -> None:
    file = save(tmp_path, lines(BELLE), "belle.jsonl")
    expected = (Turn("你好", "你好！"), Turn("写诗：\n\n要短", "床前"))
    assert load_conversations(file)[0].turns == expected
    assert load_conversations(file, format="belle")[0].turns == expected


def test_belle_without_history_and_with_a_first_answer(tmp_path: Path) -> None:
    single = {"instruction": "Human:你好\nAssistant:", "input": "", "output": "好"}
    greeted = {"instruction": "Assistant:来\nHuman:你好\nAssistant:", "input": "", "output": "好"}
    both = load_conversations(save(tmp_path, [single, greeted]), "belle")
    assert [item.turns for item in both] == [(Turn("你好", "好"),)] * 2


def test_a_last_question_and_a_first_answer_are_left_out(tmp_path: Path) -> None:
    record = {"conversations": [gpt("Welcome"), human("Hi"), gpt("Yes"), human("Bye")]}
    assert load_conversations(save(tmp_path, [record]))[0].turns == (Turn("Hi", "Yes"),)


RECORD_ERRORS: list[tuple[Any, str]] = [
    ({"id": "x7", "conversations": [human("a"), human("b")]}, "record 2 (id x7), conversations[1]: two user"),
    (
        {"id": 7, "conversations": [human("a"), gpt("")]},
        "record 2 (id 7), conversations[1].value: empty answer",
    ),
    (
        {"conversations": [{"from": "bot", "value": "a"}]},
        "record 2, conversations[0].from: unknown role 'bot'",
    ),
    ({"conversations": [human(5)]}, "record 2, conversations[0].value: must be text, not a number"),
    ({"conversations": [{"from": "human"}]}, "record 2, conversations[0].value: missing"),
    ({"conversations": [{"role": "user", "content": "a"}]}, "record 2, conversations[0].from: missing"),
    ({"conversations": {}}, "record 2, conversations: must be a list of messages, not an object"),
    ({"conversations": []}, "record 2, conversations: no human message with an answer"),
    ({"conversations": [human("a")]}, "record 2, conversations: no human message with an answer"),
    ({"conversations": ["a"]}, "record 2, conversations[0]: must be an object, not text"),
    ({"system": 1, "conversations": [human("a"), gpt("b")]}, "record 2, system: must be text, not a number"),
    ({"id": "y"}, "record 2 (id y), conversations: missing"),
    ("text", "record 2, must be an object, not text"),
    (None, "record 2, must be an object, not null"),
]


@pytest.mark.parametrize("as_lines", [False, True], ids=["array", "lines"])
@pytest.mark.parametrize(("record", "problem"), RECORD_ERRORS, ids=[problem for _, problem in RECORD_ERRORS])
def test_a_wrong_record_is_named(record: Any, problem: str, as_lines: bool, tmp_path: Path) -> None:
    file = save(tmp_path, lines(GOOD, record, GOOD) if as_lines else [GOOD, record, GOOD])
    with pytest.raises(DatasetError) as caught:
        load_conversations(file)
    assert f"1 of 3 records cannot be used: {file}, {problem}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "format_name", "problem"),
    [
        ({"instruction": "a", "input": "", "output": ""}, "alpaca", "output: empty answer"),
        ({"instruction": "a", "input": ""}, "alpaca", "output: missing"),
        ({"input": "", "output": "b"}, "alpaca", "instruction: missing"),
        ({**ALPACA, "history": [["a"]]}, "alpaca", "history[0]: must be a question and its answer"),
        ({**ALPACA, "history": [["a", " "]]}, "alpaca", "history[0][1]: empty answer"),
        ({**ALPACA, "history": "a"}, "alpaca", "history: must be a list of pairs, not text"),
        ({**ALPACA, "system": ["a"]}, "alpaca", "system: must be text, not a list"),
        ({"text": " "}, "text", "text: empty text"),
        ({"body": 1}, "text", "text: missing"),
        ({"instruction": 1, "output": "b"}, "alpaca", "instruction: must be text, not a number"),
        ({"instruction": "a", "input": None, "output": "b"}, "alpaca", "input: must be text, not null"),
        ({"instruction": "a", "input": "", "output": "b"}, "belle", "instruction: must begin with Human:"),
        ({**BELLE, "input": "x"}, "belle", "input: must be empty"),
        ({**BELLE, "output": ""}, "belle", "output: empty answer"),
        ({"instruction": "Human:a", "output": "b"}, "belle", "instruction: must end with Assistant:"),
        (
            {"instruction": "Human:a\nAssistant: b", "output": "b"},
            "belle",
            "instruction: must end with Assistant:",
        ),
        (
            {"instruction": "Assistant:", "output": "b"},
            "belle",
            "instruction: no Human: message before the answer",
        ),
        (
            {"instruction": "Human:a\nHuman:b\nAssistant:", "output": "b"},
            "belle",
            "instruction[1]: two user messages in a row",
        ),
    ],
)
def test_wrong_alpaca_and_belle_records_are_named(
    record: Any, format_name: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as caught:
        load_conversations(save(tmp_path, [record]), format_name)
    assert f"record 1, {problem}" in str(caught.value)


FILE_ERRORS: list[tuple[str, Any, str]] = [
    ("empty", "", ": empty file;"),
    ("blank", " \n\n", ": empty file;"),
    ("bom-only", "\ufeff", ": empty file;"),
    ("no-records", "[]", ": no records;"),
    ("no-inner-records", "[[], []]", ": no records;"),
    ("text", "hello", ": begins with 'h';"),
    ("latin-1", '[{"conversations": "caf\xe9"}]'.encode("latin-1"), ": not UTF-8 (line 1, byte 24 is 0xe9)"),
    ("utf-16", json.dumps([GOOD]).encode("utf-16"), ": not UTF-8 (UTF-16); convert the file"),
    (
        "cut-in-text",
        json.dumps([GOOD, OTHER])[:-20],
        ", record 2, line 1: the file ends in the middle of the array",
    ),
    (
        "cut-after-record",
        json.dumps([GOOD])[:-1],
        ", record 1, line 1: the file ends in the middle of the array",
    ),
    ("cut-after-comma", json.dumps([GOOD])[:-1] + ",", ", record 2, line 1: the file ends in the middle"),
    ("no-comma", json.dumps([GOOD])[:-1] + "\n\n{}]", ", record 1, line 3: '{' where , or ] must stand"),
    ("trailing-comma", json.dumps([GOOD])[:-1] + ",\n]", ", record 2, line 2: not JSON: Expecting value"),
    ("cut-in-word", '[{"a": tru', ", record 1, line 1: the file ends in the middle"),
    ("cut-after-list", '[{"a": [1]', ", record 1, line 1: the file ends in the middle"),
    ("open-text", '[{"a": "b}]', ", record 1, line 1: not JSON: Unterminated string"),
    (
        "bad-token",
        "[\n" + json.dumps(GOOD) + ',\n{"a": nul}]',
        ", record 2, line 3: not JSON: Expecting value",
    ),
    ("text-after", "[]\nx", ", record 0, line 2: text after the array's closing ]"),
    (
        "unknown",
        [{"id": 1, "body": "a"}],
        ", record 1: the layout cannot be told from its fields (body, id);",
    ),
    ("no-fields", "{}", ", record 1: the layout cannot be told from its fields (none);"),
]


@pytest.mark.parametrize(
    ("content", "problem"), [item[1:] for item in FILE_ERRORS], ids=[item[0] for item in FILE_ERRORS]
)
def test_a_file_that_cannot_be_used_is_named(content: Any, problem: str, tmp_path: Path) -> None:
    file = save(tmp_path, content)
    with pytest.raises(DatasetError) as caught:
        load_conversations(file)
    assert f"{file}{problem}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.json: cannot be read: No such file"):
        load_conversations(tmp_path / "none.json")
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(DatasetError, match=r"a directory without data: no file is called \*\.json"):
        load_conversations(tmp_path)


def test_a_line_that_is_no_json_is_one_wrong_record(tmp_path: Path) -> None:
    file = save(tmp_path, lines(GOOD) + '{"conversations": [\n' + lines(OTHER))
    dataset = read_dataset(file, max_invalid_fraction=0.5)
    assert [item.record for item in dataset.conversations] == [1, 3]
    assert str(dataset.errors[0]).startswith(f"{file}, record 2, line 2 is not JSON: Expecting value")


def test_nesting_without_end_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nested too deeply"):
        load_conversations(save(tmp_path, '[{"a":' + "[" * 200_000))
    with pytest.raises(DatasetError, match="nested too deeply"):
        load_conversations(save(tmp_path, '{"a":' + "[" * 200_000 + "\n"))


def test_half_a_surrogate_pair_is_an_error_of_the_record(tmp_path: Path) -> None:
    file = save(tmp_path, '[{"conversations": [{"from": "human", "value": "\\ud83d"}]}]')
    with pytest.raises(DatasetError, match=r"conversations\[0\].value: character 0 is U\+D83D"):
        load_conversations(file)


def test_a_few_wrong_records_can_be_accepted(tmp_path: Path) -> None:
    file = save(tmp_path, [GOOD, {"conversations": []}, OTHER, GOOD])
    dataset = read_dataset(file, "auto", max_invalid_fraction=0.25)
    assert (len(dataset.conversations), len(dataset.errors), dataset.total) == (3, 1, 4)
    assert dataset.errors[0].record == 2
    with pytest.raises(DatasetError, match="1 of 4 records cannot be used"):
        read_dataset(file, "auto", max_invalid_fraction=0.2)


def test_nothing_usable_is_an_error_whatever_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="2 of 2 records cannot be used"):
        read_dataset(save(tmp_path, [{"conversations": []}] * 2), max_invalid_fraction=1.0)


def test_the_message_has_the_count_and_the_first_ten(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load_conversations(save(tmp_path, [{"id": str(i), "conversations": []} for i in range(25)]))
    text = str(caught.value)
    assert text.startswith("25 of 25 records cannot be used: ")
    assert "(id 9)" in text
    assert "(id 10)" not in text
    assert text.endswith("; and 15 more")


def test_the_layout_is_told_by_the_first_record_that_is_one(tmp_path: Path) -> None:
    file = save(tmp_path, "{oops\n" + lines(BELLE))
    assert read_dataset(file, max_invalid_fraction=0.5).conversations[0].turns[0].question == "你好"


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: 'csv' is not one of auto"):
        load_conversations(save(tmp_path, [GOOD]), "csv")  # type: ignore[arg-type]


def test_items_come_one_by_one(tmp_path: Path) -> None:
    items = iterate_dataset(save(tmp_path, lines(GOOD) + "{\n" + lines(OTHER)))
    assert isinstance(next(items), Conversation)
    assert isinstance(next(items), RecordError)
    assert isinstance(next(items), Conversation)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
scalars_and_objects = values.filter(lambda value: not isinstance(value, list))


@given(
    records=st.lists(scalars_and_objects, max_size=8),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 9),
)
@settings(deadline=None)
def test_an_array_is_decoded_the_same_through_any_window(
    records: list[Any], indent: int | None, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "window.json"
    file.write_text(json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        assert [record for _, record in read_records(file)] == records


@given(text=st.text(alphabet='[]{},:"a1 \n', max_size=30), chunk=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_records_or_one_line_of_error(
    text: str, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(text, encoding="utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        found = _records_or_error(file)
    if isinstance(found, str):
        assert "\n" not in found
    elif text.lstrip().startswith("["):
        outer = json.loads(text)
        flat = [item for element in outer for item in (element if isinstance(element, list) else [element])]
        assert found == flat


def _records_or_error(file: Path) -> list[Any] | str:
    try:
        return [record for _, record in read_records(file)]
    except DatasetError as error:
        return str(error)
