"""Request bodies: read within limits of size and time, and parsed without surprises."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from yuan2_server.answers import ClientGoneError

MAX_BYTES = 16 * 2**20
"""More than any context, and enough for 2,048 texts to embed."""
UPLOAD_SECONDS = 60.0


class BodyTooLargeError(Exception):
    """The body has more than `MAX_BYTES`."""


class SlowUploadError(Exception):
    """The body was not there after `UPLOAD_SECONDS`."""


async def read_body(request: Request) -> bytes:
    """The whole body. Raises BodyTooLargeError, SlowUploadError, or ClientGoneError: the client left."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BYTES:
        raise BodyTooLargeError
    try:
        return await asyncio.wait_for(_collect(request), UPLOAD_SECONDS)
    except asyncio.TimeoutError:
        raise SlowUploadError from None
    except ClientDisconnect:
        raise ClientGoneError from None


async def _collect(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise BodyTooLargeError
    return b"".join(parts)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ValueError, with a sentence, when it is none."""
    try:
        value = json.loads(data)
        if "\\u" in data.decode(errors="replace"):
            # An escape can write half a surrogate pair, which no text in UTF-8 holds.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("the JSON has half a surrogate pair in a text") from None
    except ValueError:
        raise ValueError("must be JSON") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value
