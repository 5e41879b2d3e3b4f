"""Token ids as input for embeddings, in the tokenizer that the model's name stands for."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from yuan2_server.openai_errors import invalid

CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
"""Where tiktoken keeps the files of its encodings."""
ENCODING = "cl100k_base"
"""Of all of OpenAI's models for embeddings (tiktoken's `MODEL_TO_ENCODING`)."""
_OPENAIS = "text-embedding-"
_SOURCE = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
"""What tiktoken would fetch: in its cache the file is named after this."""


async def texts_of(model: str, inputs: Sequence[str | Sequence[int]]) -> list[str | list[int]]:
    """The inputs for a worker: texts, and token ids of its own tokenizer.

    An alias such as text-embedding-ada-002 is a model of OpenAI's: who asks for it sends ids of that model's
    tokenizer, as LangChain does by default, and these become text here. Raises OpenAIError (400).
    """
    if not model.startswith(_OPENAIS) or all(isinstance(item, str) for item in inputs):
        return [item if isinstance(item, str) else list(item) for item in inputs]
    if not is_cached():
        raise invalid(
            "input",
            f"input: token ids of {model} cannot be read without tiktoken's file of {ENCODING} in "
            f"{CACHE_VARIABLE}; send text (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        )
    return await asyncio.to_thread(_decoded, inputs)


def is_cached(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether tiktoken can be asked for the encoding without its going to the Internet."""
    folder = environment.get(CACHE_VARIABLE, "")
    name = hashlib.sha1(_SOURCE.encode(), usedforsecurity=False).hexdigest()
    return bool(folder) and (Path(folder) / name).is_file()


def _decoded(inputs: Sequence[str | Sequence[int]]) -> list[str | list[int]]:
    import tiktoken

    tokenizer = tiktoken.get_encoding(ENCODING)
    try:
        return [item if isinstance(item, str) else tokenizer.decode(list(item)) for item in inputs]
    except (KeyError, OverflowError) as error:
        raise invalid("input", f"input: {error} is no token of {ENCODING}") from None
