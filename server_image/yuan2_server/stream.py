"""From token ids to the text a client sees: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import asyncio
import codecs
import threading
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from yuan2_server.protocol import Chunk, FinishReason, RequestError, TokenLogprob, Usage
from yuan2_server.sequence import SampledToken

LOWEST_LOGPROB = -9999.0
"""What OpenAI reports for a token that cannot be: JSON has no infinity."""


class PieceTable(Protocol):
    """What a tokenizer knows about single tokens (`yuan2_core.tokenizer.Yuan2Tokenizer`)."""

    special_ids: dict[str, int]
    """Text of every atomic token to its id."""

    @property
    def dummy_prefix(self) -> bool:
        """Whether a text's first token carries a space that is not in the text."""
        ...

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token, its leading space included: half a character for a byte token."""
        ...


class Detokenizer:
    """Token ids to text, token by token: the pieces add up to `decode(ids, skip_special_tokens=True)`.

    Bytes that do not make a whole character yet are kept back; bytes that never can become U+FFFD.
    """

    def __init__(self, pieces: PieceTable) -> None:
        self._pieces = pieces
        self._special = frozenset(pieces.special_ids.values())
        self._fresh = pieces.dummy_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token."""
        if token_id in self._special:
            self._fresh = self._pieces.dummy_prefix
            return ""
        piece = self._pieces.piece_bytes(token_id)
        if self._fresh and piece:
            self._fresh = False
            piece = piece[1:] if piece[:1] == b" " else piece
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD when the answer stops inside a character."""
        return self._decoder.decode(b"", final=True)


def describe_token(pieces: PieceTable, token: SampledToken) -> TokenLogprob:
    """A token's text and probabilities. A byte token, which is no character alone, is written `<0xE4>`."""

    def text(token_id: int) -> str:
        piece = pieces.piece_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in piece)

    return TokenLogprob(
        text(token.token_id),
        max(token.logprob or 0.0, LOWEST_LOGPROB),
        tuple((text(token_id), max(value, LOWEST_LOGPROB)) for token_id, value in token.top),
    )


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces, and keeps back what could become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._pending = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that may be shown now. Once `matched`, everything from the stop string on is dropped."""
        if self.matched:
            return ""
        self._pending += text
        found = [at for at in (self._pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.matched = True
            shown, self._pending = self._pending[: min(found)], ""
            return shown
        return self._release(self._overlap())

    def flush(self) -> str:
        """What was kept back, at the end of the answer."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        cut = len(self._pending) - keep
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown

    def _overlap(self) -> int:
        """Length of the longest end of the pending text that starts a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stops):
                return size
        return 0


class TextStream:
    """The sink of one request: publishes a `Chunk` whenever there is more to show, and one at the end."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        prompt_tokens: int,
        publish: Callable[[Chunk | RequestError], None],
        *,
        prefix: str = "",
        describe: Callable[[SampledToken], TokenLogprob] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._prompt_tokens = prompt_tokens
        self._publish = publish
        self._new_text = prefix
        self._describe = describe
        self._new_logprobs: list[TokenLogprob] = []
        self._tokens = 0

    def accept(self, token: SampledToken) -> bool:
        """Take a token of the answer; True when a stop string is complete."""
        self._tokens += 1
        if self._describe is not None:
            self._new_logprobs.append(self._describe(token))
        self._new_text += self._stops.push(self._detokenizer.push(token.token_id))
        if (self._new_text or self._new_logprobs) and not self._stops.matched:
            self._send(None)
        return self._stops.matched

    def finish(self, reason: FinishReason) -> None:
        """Publish the rest of the answer with the reason for its end."""
        if not self._stops.matched:
            self._new_text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self._send(reason)

    def fail(self, error: RequestError) -> None:
        """Publish the error that ends the stream."""
        self._publish(error)

    def _send(self, reason: FinishReason | None) -> None:
        logprobs = None if self._describe is None else tuple(self._new_logprobs)
        usage = Usage(self._prompt_tokens, self._tokens)
        self._publish(Chunk(self._new_text, usage, reason, logprobs))
        self._new_text, self._new_logprobs = "", []


class Mailbox:
    """Carries chunks from the engine's thread to one coroutine. What is not fetched yet is put together: a
    slow client costs no more memory than its answer has and gets fewer, longer chunks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._unread: Chunk | RequestError | None = None
        self._fresh = asyncio.Event()

    def publish(self, item: Chunk | RequestError) -> None:
        """Hand over a chunk or the error that ends the stream; from any thread."""
        with self._lock:
            unread = self._unread
            both = isinstance(unread, Chunk) and isinstance(item, Chunk)
            self._unread = unread.then(item) if both else item  # type: ignore[union-attr, arg-type]
        if unread is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fresh.set)

    async def next(self, timeout: float) -> Chunk | None:
        """What is new, or None when there was nothing for `timeout` seconds. Raises the published
        RequestError."""
        # Not `asyncio.wait_for`: up to Python 3.11 it swallows a cancellation that comes with the event
        # (https://github.com/python/cpython/issues/86296), and an answer without reader went on to its end.
        timer = self._loop.call_later(timeout, self._fresh.set)
        try:
            await self._fresh.wait()
        finally:
            timer.cancel()
        self._fresh.clear()
        with self._lock:
            item, self._unread = self._unread, None
        if isinstance(item, RequestError):
            raise item
        return item


async def chunks_of(mailbox: Mailbox, first: Chunk, keepalive: float) -> AsyncIterator[Chunk]:
    """The chunks of one answer. When nothing happens for `keepalive` seconds (a long queue, a long prompt) an
    empty one comes, so that a reader can tell a slow worker from a dead one; `first` is empty, too."""
    last = first
    while last.finish_reason is None:
        chunk = await mailbox.next(keepalive) or Chunk("", last.usage)
        yield chunk
        last = chunk


async def cumulated(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """The chunks as FastChat expects them: each holds everything so far, and the last one is repeated once
    with its finish reason."""
    whole: Chunk | None = None
    async for chunk in chunks:
        grown = chunk if whole is None else whole.then(_like(chunk, whole))
        if chunk.finish_reason is not None and chunk.text:
            yield Chunk(grown.text, grown.usage, None, grown.logprobs)
        yield grown
        whole = grown


def _like(chunk: Chunk, whole: Chunk) -> Chunk:
    """An empty chunk has no log-probabilities, but what came before it keeps its own."""
    if chunk.logprobs is None and whole.logprobs is not None:
        return Chunk(chunk.text, chunk.usage, chunk.finish_reason, ())
    return chunk
