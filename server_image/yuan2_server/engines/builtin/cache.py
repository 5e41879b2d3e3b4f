"""Where each running sequence's keys, values and filter inputs are, and how many tokens of them fit."""

from __future__ import annotations

from typing import Any

from yuan2_server.sequence import Entry

SHARE_OF_FREE_MEMORY = 0.8
"""Of what is free once the weights are loaded; the rest is for activations."""
GROWTH = 1.25
"""A cache that grows takes room for a quarter more tokens than it holds (`yuan2_model.cache`)."""


class CacheStore:
    """One model cache a running sequence. The caches are the model's own objects; nothing here looks into
    them."""

    def __init__(self) -> None:
        self._caches: dict[int, Any] = {}

    def get(self, sequence: Entry) -> Any | None:
        """The cache that holds the first `computed` tokens; None when that is none."""
        return self._caches.get(sequence.id)

    def put(self, sequence: Entry, cache: Any) -> None:
        """Keep the cache for the sequence's next step."""
        self._caches[sequence.id] = cache

    def drop(self, sequence: Entry) -> None:
        """Free the memory of a sequence that has ended."""
        self._caches.pop(sequence.id, None)

    def __len__(self) -> int:
        return len(self._caches)


def token_bytes(layers: int, hidden: int, element_size: int) -> int:
    """Bytes a cached token takes: a key and a value of `hidden` elements in each layer."""
    return 2 * layers * hidden * element_size


def token_budget(free_bytes: int, bytes_per_token: int) -> int:
    """Tokens that fit into the share of free memory that caches may take, the room they grow into
    included."""
    return int(free_bytes * SHARE_OF_FREE_MEMORY / GROWTH) // bytes_per_token
