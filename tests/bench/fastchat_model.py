"""A model directory that FastChat's own programs load: with a modelling file beside config.json.

They load what `auto_map` of config.json names, with `trust_remote_code`. Here that file gives them our model
code, so that both sides compute with the same and only serving differs.
"""

from __future__ import annotations

import json
from pathlib import Path

MODULE = "modeling_yuan2"
MODELLING = """import sys
import types

# FastChat's environment has pydantic 1, and of our sections the model needs one name of a type.
sections = types.ModuleType("yuan2_core.sections")
sections.LossMode = str
sys.modules.setdefault("yuan2_core.sections", sections)

from yuan2_model import Yuan2Config as Ours
from yuan2_model import Yuan2ForCausalLM


class YuanConfig(Ours):
    pass


class YuanForCausalLM(Yuan2ForCausalLM):
    config_class = YuanConfig

    @classmethod
    def from_pretrained(cls, directory, *_, torch_dtype=None, **__):
        return Yuan2ForCausalLM.from_pretrained(directory, torch_dtype=torch_dtype).eval()
"""


def for_fastchat(model: Path, target: Path) -> Path:
    """The same model at `target`, whose name must contain `yuan2`: by that FastChat knows what it is."""
    assert "yuan2" in target.name
    target.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{MODULE}.YuanConfig",
        "AutoModelForCausalLM": f"{MODULE}.YuanForCausalLM",
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (target / f"{MODULE}.py").write_text(MODELLING, encoding="utf-8")
    return target
