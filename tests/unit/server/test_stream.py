"""Text as clients see it: whole characters, stop strings withheld, cumulative chunks."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.serving import TEXTS
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_server.protocol import Chunk, ErrorCode, RequestError, TokenLogprob, Usage
from yuan2_server.sequence import SampledToken
from yuan2_server.stream import (
    Detokenizer,
    Mailbox,
    StopMatcher,
    TextStream,
    chunks_of,
    cumulated,
    describe_token,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    return train_tokenizer(TEXTS, 420, tmp_path_factory.mktemp("tokenizer"))


def byte_ids(tokenizer: Yuan2Tokenizer, text: str) -> list[int]:
    """The text in byte pieces, whatever longer pieces the tokenizer has."""
    by_bytes = {
        tokenizer.piece_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids
    }
    pieces = {value: key for value, key in by_bytes.items() if len(value) == 1}
    return [pieces[bytes([byte])] for byte in text.encode()]


def test_half_a_character_is_kept_back(tokenizer: Yuan2Tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in byte_ids(tokenizer, "a你🙂")] == [
        "a",
        "",
        "",
        "你",
        "",
        "",
        "",
        "🙂",
    ]
    assert detokenizer.flush() == ""


def test_an_answer_that_ends_inside_a_character_shows_that_it_does(tokenizer: Yuan2Tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in byte_ids(tokenizer, "你")[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


@given(data=st.data())
def test_pieces_add_up_to_the_tokenizers_own_decoding(tokenizer: Yuan2Tokenizer, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3)))
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert shown == tokenizer.decode(ids, skip_special_tokens=True)


@given(
    st.text(alphabet="ab你", max_size=30),
    st.lists(st.text(alphabet="ab你", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_what_is_shown_ends_before_the_first_stop_string(text: str, stops: list[str], data: st.DataObject):
    matcher, shown, rest = StopMatcher(tuple(stops)), "", text
    while rest and not matcher.matched:
        size = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:size])
        rest = rest[size:]
        assert not any(stop in shown for stop in stops)
    if not matcher.matched:
        shown += matcher.flush()
    ends = [text.find(stop) for stop in stops if stop in text]
    # Which of two overlapping stop strings is complete first depends on where the pieces end.
    assert shown in ([text[:end] for end in ends] or [text])
    assert matcher.matched == bool(ends)


def test_the_start_of_a_stop_string_is_withheld_until_it_is_none():
    matcher = StopMatcher(("<end>",))
    assert [matcher.push(piece) for piece in ("hello <", "en", "glish", " <e", "nd>", "more")] == [
        "hello ",
        "",
        "<english",
        " ",
        "",
        "",
    ]
    assert matcher.matched


def collect(tokenizer: Yuan2Tokenizer, ids: list[int], stops: tuple[str, ...] = (), **options):
    """Chunks of an answer and whether each token was said to be the last."""
    chunks: list[Chunk | RequestError] = []
    stream = TextStream(Detokenizer(tokenizer), stops, 7, chunks.append, **options)
    ended = [stream.accept(SampledToken(token, -0.5, ((token, -0.5),))) for token in ids]
    stream.finish("stop")
    return chunks, ended


def test_chunks_hold_what_is_new_and_count_tokens(tokenizer: Yuan2Tokenizer):
    ids = tokenizer.encode("Who are you? 你是谁？")
    chunks, ended = collect(tokenizer, ids)
    assert not any(ended)
    assert "".join(chunk.text for chunk in chunks) == "Who are you? 你是谁？"
    assert (chunks[-1].usage, chunks[-1].finish_reason) == (Usage(7, len(ids)), "stop")


def test_a_stop_string_inside_a_token_cuts_the_text(tokenizer: Yuan2Tokenizer):
    chunks, ended = collect(tokenizer, tokenizer.encode("Who are you?"), stops=("re y",))
    assert True in ended
    assert "".join(chunk.text for chunk in chunks) == "Who a"


def test_the_logprobs_of_each_token_are_sent_once(tokenizer: Yuan2Tokenizer):
    """Cumulative ones are quadratic: 2,000 tokens with 20 alternatives made documents of a megabyte."""
    ids = tokenizer.encode("Who are you?") * 50
    chunks, _ = collect(tokenizer, ids, describe=lambda token: describe_token(tokenizer, token))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(entries) == len(ids)
    assert max(len(chunk.logprobs) for chunk in chunks) == 1
    first, second = chunks[0], chunks[1]
    assert first.then(second).logprobs == (*first.logprobs, *second.logprobs)


def test_a_byte_token_is_written_as_a_byte(tokenizer: Yuan2Tokenizer):
    half, space = byte_ids(tokenizer, "你")[0], tokenizer.encode("a b")[1]
    described = describe_token(tokenizer, SampledToken(half, -1.0, ((half, -1.0), (space, -2.0))))
    assert described.token == "<0xE4>"
    assert described.top == (("<0xE4>", -1.0), (tokenizer.piece_bytes(space).decode(), -2.0))


async def test_what_nobody_has_read_yet_is_put_together():
    mailbox = Mailbox(asyncio.get_running_loop())
    mailbox.publish(Chunk("a", Usage(3, 1)))
    chunks = chunks_of(mailbox, Chunk("", Usage(3, 0)), 5)
    assert await anext(chunks) == Chunk("a", Usage(3, 1))
    mailbox.publish(Chunk("b", Usage(3, 2)))
    mailbox.publish(Chunk("c", Usage(3, 3), "stop"))
    assert [chunk async for chunk in chunks] == [Chunk("bc", Usage(3, 3), "stop")]


async def test_for_fastchat_text_grows_and_the_last_one_is_repeated_with_its_reason():
    async def chunks():
        yield Chunk("", Usage(3, 0))
        yield Chunk("a", Usage(3, 1), None, (entry("a"),))
        yield Chunk("", Usage(3, 1))
        yield Chunk("bc", Usage(3, 3), "stop", (entry("b"), entry("c")))

    def entry(token: str) -> TokenLogprob:
        return TokenLogprob(token, -1.0)

    grown = [chunk async for chunk in cumulated(chunks())]
    assert [(chunk.text, chunk.finish_reason) for chunk in grown] == [
        ("", None),
        ("a", None),
        ("a", None),
        ("abc", None),
        ("abc", "stop"),
    ]
    assert [len(chunk.logprobs or ()) for chunk in grown] == [0, 1, 1, 3, 3]


async def test_silence_gives_empty_chunks_and_an_error_ends_the_stream():
    mailbox = Mailbox(asyncio.get_running_loop())
    first = Chunk("", Usage(3, 0))
    stream = chunks_of(mailbox, first, 0.01)
    assert [await anext(stream), await anext(stream)] == [first, first]
    threading.Thread(target=mailbox.publish, args=[RequestError(ErrorCode.INTERNAL_ERROR, "broken")]).start()
    with pytest.raises(RequestError, match="broken"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("turns", range(8))
async def test_a_reader_that_is_given_up_just_when_something_arrives_ends(turns: int):
    """Whatever the event loop has done of it by then: `asyncio.wait_for` swallows this on Python 3.11."""
    mailbox = Mailbox(asyncio.get_running_loop())
    reader = asyncio.ensure_future(mailbox.next(60.0))
    await asyncio.sleep(0)
    mailbox.publish(Chunk("x", Usage(1, 1)))
    for _ in range(turns):
        await asyncio.sleep(0)
    given_up = reader.cancel()
    await asyncio.wait({reader})
    assert reader.cancelled() == given_up


async def test_a_reader_hears_when_there_is_nothing():
    assert await Mailbox(asyncio.get_running_loop()).next(0.01) is None
