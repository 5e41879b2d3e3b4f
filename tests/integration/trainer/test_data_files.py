"""A run over a mix of files, with raw text in it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.ranks import train
from tests.support.training import conversations, losses, make_job, metrics


def test_a_mix_with_raw_text_trains_and_asks_only_what_can_be_asked(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.json").write_text(json.dumps(conversations(6)))
    (data / "b.txt").write_text("wind and rain and snow, " * 100)
    job = make_job(
        inputs[0],
        data,
        tmp_path / "output",
        files=[{"path": "b.txt"}, {"path": "a.json", "weight": 2}],
        eval_fraction=0.3,
        evaluation={"sample_answers": 4},
        max_length=64,
        max_steps=8,
        learning_rate=3e-3,
    )
    train(job, tmp_path / "workspace")
    found = losses(tmp_path / "output")
    assert found[-1] < found[0]
    assert any("evalLoss" in row for row in metrics(tmp_path / "output"))
    samples = [json.loads(line) for line in (tmp_path / "output/samples.jsonl").read_text().splitlines()]
    assert samples
    assert all("?" in row["question"] for row in samples)
