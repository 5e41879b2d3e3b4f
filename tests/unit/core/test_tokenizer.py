"""The tokenizer: spans that cover, text that comes back, special tokens, and files that cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.published import PUBLISHED, published_tokenizer
from yuan2_core.errors import TokenizerError
from yuan2_core.sentencepiece_model import append_pieces
from yuan2_core.special_tokens import ADDED, EOD, PIECES, SEP, SPECIAL_TOKENS, STRUCTURE
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

words = st.sampled_from(
    [*SPECIAL_TOKENS, "<n>", "\u2581", " ", "  ", "\n", "Yuan", "语言", "<s>", "<0x41>", "🤖"]
)
characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(words | st.text(characters, max_size=8), max_size=8).map("".join)


@given(text=texts)
@example(text="\u2581a \u2581🤖 \u2581")
@settings(deadline=None)
def test_spans_cover_the_text_and_hold_the_bytes_of_their_pieces(
    tokenizer: Yuan2Tokenizer, text: str
) -> None:
    ids, starts = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text)
    assert not text or starts[0] == 0
    ends = [*starts, len(text.encode())][1:]
    for token, start, end in zip(ids, starts, ends, strict=True):
        covered = text.encode()[start:end].replace("\u2581".encode(), b" ")
        assert covered in (tokenizer.piece_bytes(token), tokenizer.piece_bytes(token).removeprefix(b" "))


@given(text=texts)
@settings(deadline=None)
def test_decoding_gives_the_text_back(tokenizer: Yuan2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@given(text=texts)
@settings(deadline=None)
def test_structure_spelled_in_a_message_stays_text(tokenizer: Yuan2Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, structure=False)
    assert not {tokenizer.eod_id, tokenizer.sep_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", SPECIAL_TOKENS)
def test_special_tokens_are_atomic(tokenizer: Yuan2Tokenizer, text: str) -> None:
    assert tokenizer.encode(f"{text}{text}") == [tokenizer.special_ids[text]] * 2
    assert (tokenizer.encode(text, structure=False) == [tokenizer.special_ids[text]]) == (
        text not in STRUCTURE
    )


def test_separator_between_turns_is_ordinary_text(tokenizer: Yuan2Tokenizer) -> None:
    assert b"".join(map(tokenizer.piece_bytes, tokenizer.encode("<n>"))) == b" <n>"


def test_missing_special_tokens_are_added_after_the_pieces_in_order(tokenizer: Yuan2Tokenizer) -> None:
    first = tokenizer.vocab_size - len(ADDED)
    assert [tokenizer.special_ids[text] for text in ADDED] == list(range(first, tokenizer.vocab_size))
    assert max(tokenizer.special_ids[text] for text in PIECES) == first - 1


def test_decoding_can_leave_special_tokens_out(tokenizer: Yuan2Tokenizer) -> None:
    ids = [*tokenizer.encode("I am Yuan"), tokenizer.sep_id, *tokenizer.encode("我是源"), tokenizer.eod_id]
    assert tokenizer.decode(ids) == "I am Yuan<sep>我是源<eod>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "I am Yuan我是源"


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Yuan2Tokenizer) -> None:
    ids = tokenizer.encode("🤖")
    assert b"".join(map(tokenizer.piece_bytes, ids)) == " 🤖".encode()
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(
    tokenizer: Yuan2Tokenizer,
) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 81]) == ""
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.decode([-1])


def test_control_pieces_have_no_text(tokenizer: Yuan2Tokenizer) -> None:
    assert tokenizer.decode([0, 1, 2]) == ""


def test_saving_and_loading_gives_the_same_tokenizer(tokenizer: Yuan2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "copy")
    for path in (tmp_path / "copy", tmp_path / "copy" / "tokenizer.model"):
        loaded = Yuan2Tokenizer.from_pretrained(path)
        assert loaded.special_ids == tokenizer.special_ids
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.model_bytes == tokenizer.model_bytes


def test_a_tokenizer_travels_to_another_process(tokenizer: Yuan2Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Who are you?<sep>") == tokenizer.encode("Who are you?<sep>")


if PUBLISHED:

    def test_published_tokenizer_has_the_published_ids() -> None:
        tokenizer = published_tokenizer()
        assert (tokenizer.eod_id, tokenizer.sep_id, tokenizer.pad_id) == (77185, 77187, 77188)
        assert [tokenizer.special_ids[text] for text in ADDED] == [134953, 134954, 134955, 134956, 134957]
        assert tokenizer.vocab_size == 134_958
        assert set(tokenizer.special_ids) == set(SPECIAL_TOKENS)


@pytest.mark.parametrize("which", ["trained", *PUBLISHED])
@pytest.mark.torch
def test_transformers_reads_what_was_saved_the_same_way(
    which: str, tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    import transformers

    ours = tokenizer if which == "trained" else published_tokenizer()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    text = "Who are you?<n>I am Yuan. <sep>我是源<eod> a <FIM_PREFIX>\tx <commit_msg>  y🤖"
    if int(transformers.__version__.split(".")[0]) >= 5:
        # The slow Llama tokenizer is gone: a space after a special token is not kept (docs/outputs.md).
        assert theirs.encode(text) != ours.encode(text)
        assert theirs.encode("Who are you?<n>") == ours.encode("Who are you?<n>")
    else:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size


def test_training_is_deterministic_and_keeps_to_the_size(tmp_path: Path) -> None:
    corpus = ["Who are you? I am Yuan.", "你是谁？我是源。"] * 4
    first = train_tokenizer(corpus, 400, tmp_path / "one.model")
    second = train_tokenizer(corpus, 400, tmp_path / "two.model")
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert first.vocab_size == second.vocab_size <= 400


def test_training_does_not_learn_special_tokens_as_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a<sep>b <sep> <sep >"] * 50, 340, tmp_path)
    assert tokenizer.sep_id not in tokenizer.encode("a<sep>b", structure=False)
    assert tokenizer.decode(tokenizer.encode("a<sep>b", structure=False)) == "a<sep>b"


def test_training_takes_long_lines(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["源" * 20_000, "a" * 20_000], 300, tmp_path)
    assert len(tokenizer.encode("a")) == 1 or len(tokenizer.encode("源")) <= 2


@pytest.mark.parametrize(
    ("corpus", "size", "problem"),
    [([], 400, "without text"), ([""], 400, "without text"), (["abc"], 200, "too small")],
)
def test_training_that_cannot_work_is_refused(
    corpus: list[str], size: int, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        train_tokenizer(corpus, size, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: no such file"):
        Yuan2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff", b"\x08" + b"\xff" * 20])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        Yuan2Tokenizer.from_pretrained(tmp_path)


def test_a_truncated_model_is_refused(tokenizer: Yuan2Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        Yuan2Tokenizer(tokenizer.model_bytes[:-7])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer changes text"),
        ({"remove_extra_whitespaces": True}, "normalizer changes text"),
        ({"byte_fallback": False}, "no byte fallback"),
    ],
)
def test_a_model_that_loses_text_is_refused(
    settings: dict[str, object], problem: str, tmp_path: Path
) -> None:
    model = _train_plain(tmp_path, **settings)
    with pytest.raises(TokenizerError, match=problem):
        Yuan2Tokenizer(append_pieces(model, PIECES))


def test_a_model_without_dummy_space_keeps_spans_and_text(tmp_path: Path) -> None:
    tokenizer = Yuan2Tokenizer(append_pieces(_train_plain(tmp_path, add_dummy_prefix=False), PIECES))
    ids, starts = tokenizer.encode_spans(" ab a<sep>b \u2581 a")
    assert tokenizer.decode(ids) == " ab a<sep>b   a"
    assert starts[0] == 0
    assert not tokenizer.dummy_prefix


@pytest.mark.parametrize("lost", STRUCTURE)
def test_a_model_without_a_structure_token_is_refused_by_name(lost: str, tmp_path: Path) -> None:
    rest = [text for text in PIECES if text != lost]
    file = tmp_path / "tokenizer.model"
    file.write_bytes(append_pieces(_train_plain(tmp_path), rest))
    with pytest.raises(TokenizerError) as caught:
        Yuan2Tokenizer.from_pretrained(file)
    assert str(file) in str(caught.value)
    assert f"no {lost} token" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_added_tokens_beside_the_model_are_honoured(tmp_path: Path) -> None:
    model = append_pieces(_train_plain(tmp_path), [EOD])
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    (tmp_path / "tokenizer.model").write_bytes(model)
    table = {"<sep>": size, "<pad>": size + 1, "<tool>": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(table))
    tokenizer = Yuan2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<sep><pad><tool>") == [size, size + 1, size + 2]
    assert tokenizer.special_ids["<mask>"] == size + 3
    assert tokenizer.vocab_size == size + 3 + len(SPECIAL_TOKENS) - 3


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("added_tokens.json", "[]", "must hold a JSON object"),
        ("added_tokens.json", "{", "cannot be read as JSON"),
        ("added_tokens.json", '{"<x>": true}', "token <x>: True is not an id"),
        ("added_tokens.json", '{"<x>": -1}', "token <x>: -1 is not an id"),
        ("added_tokens.json", '{"<x>": 5}', "added token <x> has id 5, which is the piece"),
        ("added_tokens.json", '{"<x>": 900, "<y>": 900}', "<x> and <y> share id 900"),
        ("added_tokens.json", '{"<x>": 9000000000}', "<x> has id 9000000000, which leaves ids after the"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "must be an object of ids"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {}}}', "900: has no content"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<x>"}}}', "'x' is not an id"),
    ],
)
def test_a_table_of_added_tokens_that_cannot_be_is_refused(
    file: str, content: str, problem: str, tokenizer: Yuan2Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Yuan2Tokenizer.from_pretrained(tmp_path)
    assert problem in str(caught.value)


def test_two_ids_for_one_added_token_are_refused(tokenizer: Yuan2Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 900}')
    described = {"added_tokens_decoder": {"901": {"content": "<x>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(TokenizerError, match=r"token <x> has id 901 here and 900 in added_tokens\.json"):
        Yuan2Tokenizer.from_pretrained(tmp_path)


def _train_plain(directory: Path, **changes: object) -> bytes:
    """A SentencePiece model without special tokens."""
    settings: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "vocab_size": 280,
        **changes,
    }
    if not settings["byte_fallback"]:
        settings["vocab_size"] = 16
    prefix = directory / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab aab abb < > sep eod pad"] * 4), model_prefix=str(prefix), **settings
    )
    return prefix.with_suffix(".model").read_bytes()


def test_separator_is_a_single_id_only_where_it_is_cut_out(tokenizer: Yuan2Tokenizer) -> None:
    assert tokenizer.encode(SEP) == [tokenizer.sep_id]
    assert len(tokenizer.encode(SEP, structure=False)) > 1


ANY_TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("Whoare you?\u2581 \n\t.,<>n你是谁源，。！hello"), st.characters(codec="utf-8")
    ),
    max_size=160,
)


def as_ids(ids: bytes) -> list[int]:
    return list(memoryview(ids).cast("i"))


@given(text=ANY_TEXT)
def test_segments_give_what_the_model_gives_in_one_piece(tokenizer: Yuan2Tokenizer, text: str) -> None:
    whole = tokenizer._processor.encode(text)
    assert as_ids(tokenizer._encoder.encode(text)) == whole
    assert as_ids(tokenizer._encoder.encode(text)) == whole  # now from memory


@given(text=ANY_TEXT, data=st.data())
def test_a_part_of_an_encoded_text_is_encoded_as_if_alone(
    tokenizer: Yuan2Tokenizer, text: str, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, len(text)))
    part = tokenizer._encoder.read(text).part(first, last)
    assert as_ids(part) == tokenizer._processor.encode(text[first:last])
