"""The agents of a run's pods hear of each other, so that a rank that dies takes all others down at once.

Inside a pod torchrun does that. Between pods a rank notices by itself only if the connection to the dead one
is closed: gloo's is, NCCL's over InfiniBand may not be, and then a rank waits for the collective's time-out.
So each agent counts up in torchrun's own store, which the first pod's agent keeps, and tells there how it
ended. One that told of a failure, or has been silent for `SILENCE_SECONDS`, is lost, and all others end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0
"""An agent does nothing but wait: its pod or its node is gone. With `GRACE_SECONDS` it is below half a
minute."""
GRACE_SECONDS = 5.0
"""In which the ranks may end by themselves and say more."""

_ANSWER = timedelta(seconds=10)
_ENDED_WELL, _FAILED = 1, 2
_LOG = logging.getLogger(__name__)


@dataclass
class Watch:
    """Finds out who is lost from what is seen in the store."""

    node: int
    nodes: int
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def lost(self, beats: Mapping[int, int], ends: Mapping[int, int], now: float) -> str | None:
        """Words on the first pod that is lost, `None` while all are well.

        Args:
            beats: how far each pod has counted; 0 before it has joined.
            ends: 0 for a pod that runs, else how it ended.
            now: seconds of a clock that only goes forward.
        """
        for node in range(self.nodes):
            if node == self.node or ends[node] == _ENDED_WELL:
                continue
            if ends[node] == _FAILED:
                return f"a rank of pod {node} ended"
            if self._silence(node, beats[node], now) > SILENCE_SECONDS:
                return f"pod {node} has been silent for {SILENCE_SECONDS:g} s"
        return None

    def _silence(self, node: int, beat: int, now: float) -> float:
        count, since = self._seen.get(node, (0, now))
        if beat != count or beat == 0:
            count, since = beat, now
        self._seen[node] = count, since
        return now - since


class Lifeline:
    """One pod's end of it; `on_loss` is called once, in a thread, `GRACE_SECONDS` after another pod was lost.

    It waits for the first pod as long as torchrun itself does: `joining`."""

    def __init__(
        self, address: str, port: int, watch: Watch, on_loss: Callable[[str], None], joining: timedelta
    ) -> None:
        self._address = address
        self._port = port
        self._joining = joining
        self._watch = watch
        self._on_loss = on_loss
        self._over = Event()
        self._store: Any = None
        self._thread = Thread(target=self._run, name="lifeline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, well: bool) -> None:
        """Tell the other pods that this one's ranks have ended."""
        self._over.set()
        if self._store is None:
            return
        self._thread.join(timeout=_ANSWER.total_seconds())
        try:
            self._store.add(_key("end", self._watch.node), _ENDED_WELL if well else _FAILED)
        except RuntimeError as error:
            _LOG.debug("the first pod's store is closed already: %s", error)

    def _run(self) -> None:
        loss = self._watch_until_over()
        if loss is not None and not self._over.wait(GRACE_SECONDS):
            self._on_loss(loss)

    def _watch_until_over(self) -> str | None:
        try:
            store = _connect(self._address, self._port, self._joining)
        except RuntimeError as error:
            # torchrun waits for the same store, and says so.
            _LOG.debug("no store: %s", error)
            return None
        self._store = store
        while not self._over.is_set():
            try:
                loss = self._look(store)
            except RuntimeError as error:
                loss = f"pod 0 no longer answers: {error}"
            if loss is not None:
                return loss
            self._over.wait(BEAT_SECONDS)
        return None

    def _look(self, store: Any) -> str | None:
        store.add(_key("beat", self._watch.node), 1)
        pods = range(self._watch.nodes)
        beats = {node: store.add(_key("beat", node), 0) for node in pods}
        ends = {node: store.add(_key("end", node), 0) for node in pods}
        return self._watch.lost(beats, ends, time.monotonic())


def _connect(address: str, port: int, joining: timedelta) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch builds that name at run time

    store = TCPStore(address, port, is_master=False, timeout=joining, wait_for_workers=False)
    store.set_timeout(_ANSWER)
    return store


def _key(what: str, node: int) -> str:
    return f"yuan2/{what}/{node}"
