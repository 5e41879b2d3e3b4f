"""Conversations stream from disk: four times as many take no more memory to prepare."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.many_conversations import SENTENCE, TURNS, write_conversations
from tests.support.training import REPOSITORY
from yuan2_core.tokenizer import train_tokenizer

MEGABYTE = 1 << 20
FEW = 7000
"""Conversations of a file that is just large enough for a second process."""
PREPARE = """
import resource, sys
from pathlib import Path
from yuan2_core.contract import DatasetLocation
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.prepare import prepare

data, model, target = map(Path, sys.argv[1:])
prepared = prepare(
    DatasetLocation(path=str(data)), Training(), Yuan2Tokenizer.from_pretrained(model), target, lambda: None
)
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(prepared.samples, *peaks)
"""


def peaks(root: Path, count: int) -> tuple[int, int]:
    """Highest resident memory in bytes of the process that prepares, and of the largest one it started."""
    write_conversations(root / f"{count}.jsonl", count)
    command = [sys.executable, "-c", PREPARE, str(root / f"{count}.jsonl"), str(root), str(root / f"{count}")]
    path = [str(REPOSITORY / part) for part in ("core", "trainer_image")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    words = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(words[0]) == TURNS * count
    return 1024 * int(words[1]), 1024 * int(words[2])


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    train_tokenizer([SENTENCE], 400, tmp_path).save_pretrained(tmp_path)
    before, after = peaks(tmp_path, FEW), peaks(tmp_path, 4 * FEW)
    text = (tmp_path / f"{4 * FEW}.jsonl").stat().st_size - (tmp_path / f"{FEW}.jsonl").stat().st_size
    assert text > 25 * MEGABYTE
    for one, other in zip(before, after, strict=True):
        assert other - one < text / 4, (before, after)
