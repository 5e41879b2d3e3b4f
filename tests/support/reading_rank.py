"""A rank that notes what it reads of weights, a line of name and bytes for each, in `reads-RANK.txt`, and in
`held-RANK.txt` the bytes of what it keeps of a loaded model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support.readings import note_name


def main(arguments: list[str]) -> int:
    """`yuan2_trainer.rank` with its arguments."""
    from yuan2_model import weights
    from yuan2_trainer import rank
    from yuan2_trainer.checkpoint import shards
    from yuan2_trainer.model import loading

    loading.check_model = _noting_held(loading.check_model, Path(arguments[0]))  # type: ignore[attr-defined]
    note = Path(arguments[0]) / note_name(int(os.environ["RANK"]))
    note.touch()
    for module in (weights, shards):
        module.safe_open = _noting(module.safe_open, note)  # type: ignore[attr-defined]
    return rank.main(arguments)


def _noting_held(check: Any, workspace: Path) -> Any:
    def noted(model: Any, job: Any) -> None:
        pieces = [getattr(item, "ds_tensor", item) for item in model.parameters()]
        held = sum(piece.numel() * piece.element_size() for piece in pieces)
        (workspace / f"held-{os.environ['RANK']}.txt").write_text(str(held))
        check(model, job)

    return noted


def _noting(opening: Any, note: Path) -> Any:
    class Noted:
        """An open file of tensors."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = opening(*arguments, **options)

        def __enter__(self) -> Noted:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> Any:
            return _noted(self._file.get_tensor(name), name, note)

        def get_slice(self, name: str) -> Any:
            return _NotedSlice(self._file.get_slice(name), name, note)

    return Noted


class _NotedSlice:
    def __init__(self, inner: Any, name: str, note: Path) -> None:
        self._inner, self._name, self._note = inner, name, note

    def __getitem__(self, places: Any) -> Any:
        return _noted(self._inner[places], self._name, self._note)


def _noted(tensor: Any, name: str, note: Path) -> Any:
    with note.open("a") as lines:
        lines.write(f"{name} {tensor.numel() * tensor.element_size()}\n")
    return tensor
