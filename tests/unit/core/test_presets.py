"""Sizes of the published models."""

from __future__ import annotations

import pytest

from yuan2_core.presets import PRESETS, config_differences, zero_stage

PARAMETERS = {"2B": 2_088_724_480, "51B": 51_842_105_344, "102B": 102_577_954_816}
CONFIG_2B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 135040,
}


@pytest.mark.parametrize("size", PRESETS)
def test_dimensions_give_the_published_number_of_parameters(size: str) -> None:
    assert PRESETS[size].parameters == PARAMETERS[size]


def test_small_models_train_with_zero_2_and_large_ones_with_zero_3() -> None:
    stages = {size: zero_stage(size) for size in ("2B", "51B", "102B", "custom")}
    assert stages == {"2B": 2, "51B": 3, "102B": 3, "custom": 2}


def test_a_config_of_the_right_size_has_no_differences() -> None:
    assert config_differences(CONFIG_2B, "2B") == []


def test_every_difference_is_a_sentence() -> None:
    config = {**CONFIG_2B, "num_hidden_layers": 12}
    del config["vocab_size"]
    assert config_differences(config, "2B") == [
        "config.json has num_hidden_layers 12, but Yuan 2.0 2B has 24",
        "config.json has no vocab_size, which is 135040 in Yuan 2.0 2B",
    ]


def test_custom_takes_any_config() -> None:
    assert config_differences({}, "custom") == []
