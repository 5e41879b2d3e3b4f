"""The `n` answers to one request: opened together, read as they arrive, given up together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from yuan2_server.upstream import Document, Upstream

Stream = AsyncGenerator[Document | None, None]


@dataclass(frozen=True)
class Answers:
    """Streams that have given their first item: a document, or None while a worker is busy with others."""

    first: tuple[Document | None, ...]
    streams: tuple[Stream, ...]

    async def close(self) -> None:
        """Give up what is still being generated."""
        for stream in self.streams:
            await stream.aclose()

    async def documents(self) -> AsyncGenerator[tuple[int, Document | None], None]:
        """What all streams give, as it arrives, each item with the number of its stream."""
        for index, document in enumerate(self.first):
            yield index, document
        waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(self.streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    try:
                        document = task.result()
                    except StopAsyncIteration:
                        continue
                    yield index, document
                    waiting[asyncio.ensure_future(anext(self.streams[index]))] = index
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await self.close()


async def open_answers(upstream: Upstream, requests: Sequence[Document]) -> Answers:
    """Start an answer for each of the workers' requests.

    Raises OpenAIError when one of them cannot start; the others are given up.
    """
    streams = tuple(upstream.generate(params) for params in requests)
    starts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    async with AsyncExitStack() as undo:
        for start, stream in zip(starts, streams, strict=True):
            undo.push_async_callback(_give_up, start, stream)
        first = await asyncio.gather(*starts)
        undo.pop_all()
    return Answers(tuple(first), streams)


async def _give_up(start: asyncio.Future[Document | None], stream: Stream) -> None:
    start.cancel()
    await asyncio.wait({start})
    if not start.cancelled():
        start.exception()  # it is told to the client, or another one's is
    await stream.aclose()
