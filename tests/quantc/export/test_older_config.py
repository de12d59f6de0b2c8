"""Settings as transformers 4 wrote them, from those of transformers 5."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from quantc.export.folders.older_config import older_settings

PLAIN = {"rope_theta": 5e4, "rope_type": "default"}
SCALED = {"rope_theta": 5e4, "rope_type": "linear", "factor": 4.0}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, {}),
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": {"rope_type": "default"}}, {}),
        ({"rope_parameters": PLAIN}, {"rope_theta": 5e4, "rope_scaling": None}),
        (
            {"rope_parameters": SCALED},
            {"rope_theta": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {"rope_theta": 3e3}}},
            {"rope_theta": 5e4, "rope_scaling": None, "rope_local_base_freq": 3e3},
        ),
        ({"layer_types": KINDS * 2}, {"sliding_window_pattern": 3}),
        ({"layer_types": [*KINDS, "full_attention"]}, {}),
        ({"layer_types": ["full_attention"] * 4}, {}),
        ({"layer_types": KINDS, "sliding_window_pattern": "LLG"}, {}),
    ],
)
def test_both_are_written_where_there_is_something_to_say(settings: dict[str, Any], found: dict[str, Any]) -> None:
    assert older_settings(settings) == found


def test_transformers_reads_the_same_config_with_them(tmp_path: Any) -> None:
    rope = {"full_attention": SCALED, "sliding_attention": {"rope_theta": 3e3, "rope_type": "default"}}
    for model, settings in (
        ("llama", {"rope_parameters": SCALED}),
        ("gemma3_text", {"rope_parameters": rope, "num_hidden_layers": 6, "layer_types": KINDS * 2}),
    ):
        config = AutoConfig.for_model(model, **settings)
        read = type(config).from_dict({**config.to_dict(), **older_settings(config.to_dict())})
        assert read.rope_parameters == config.rope_parameters
        assert getattr(read, "layer_types", None) == getattr(config, "layer_types", None)
