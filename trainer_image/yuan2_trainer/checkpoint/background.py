"""One task at a time beside the training."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """Runs a task in a thread; its error belongs to whoever asks next."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Run a task when the one before it has ended; raises that one's error."""
        self.wait()
        self._thread = Thread(target=self._run, args=(task,), name="background", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a task that failed, once."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def wait(self) -> None:
        """Wait for the task, if there is one, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again where the training goes on
            self._error = error
