"""What cannot be served is rejected with one sentence before the first token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import Tiny

SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("fields", "options", "sentence"),
    [
        ({}, {"speculative_config": SPECULATION}, "cannot take back the localized filter's state"),
        ({}, {"enable_lora": True, "fully_sharded_loras": True}, "fully_sharded_loras: not supported"),
        ({}, {"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model"),
        ({}, {"tensor_parallel_size": 4}, "tensor_parallel_size 4: .* must divide 2"),
        ({"num_attention_heads": 3}, {}, "hidden_size 128 is no multiple of num_attention_heads 3"),
        ({"hidden_act": "gelu"}, {}, "hidden_act 'gelu'"),
    ],
    ids=["speculative", "sharded adapters", "pipeline parallel", "ranks", "heads", "activation"],
)
def test_settings(
    fields: dict[str, Any], options: dict[str, Any], sentence: str, tiny: Tiny, tmp_path: Path
) -> None:
    """The configuration is vLLM's own, as `vllm serve` makes it; the model is asked to be built from it."""
    from vllm.engine.arg_utils import EngineArgs

    from yuan2_vllm import register
    from yuan2_vllm.model import Yuan2ForCausalLM

    register()
    shutil.copytree(tiny.directory, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    arguments = EngineArgs(model=str(tmp_path), dtype="float32", max_model_len=256, **options)
    with pytest.raises(Exception, match=sentence):
        Yuan2ForCausalLM(vllm_config=arguments.create_engine_config())
