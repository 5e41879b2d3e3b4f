"""The model as torch.compile makes it, which is vLLM's default, against our own model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.vllm.engines import ROOT, Tiny, read_answers, wrong

PROGRAM = """
import json, sys
from pathlib import Path
from tests.vllm.engines import batch, engine

if __name__ == "__main__":
    directory, prompts = json.load(sys.stdin)
    llm = engine(Path(directory), enforce_eager=False, max_num_batched_tokens=64, enable_prefix_caching=True)
    compiled = llm.llm_engine.vllm_config.compilation_config.mode
    answers = [{"ids": found.ids, "logprobs": found.logprobs} for found in batch(llm, prompts)]
    Path(sys.argv[1]).write_text(json.dumps({"mode": int(compiled), "answers": answers}))
"""


def test_compiled_answers_are_those_of_our_own_model(tiny: Tiny, tmp_path: Path) -> None:
    """In a process of its own: here compiling is switched off."""
    import json

    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {
        **os.environ,
        "TORCHDYNAMO_DISABLE": "0",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "found.json")],
        input=json.dumps([str(tiny.directory), tiny.prompts]),
        text=True,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mode"] != 0, "it was compiled"
    assert not wrong(read_answers(found["answers"]), tiny.answers)
