"""Vision-language models: the text decoder is quantized, the tower stays as it is, both run after loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import quantc
from quantc.errors import ModelError
from quantc.frontend import model_files, open_model
from quantc.frontend.auto import auto_class
from quantc.graph.decoder import find_decoder
from quantc.graph.derive import derive
from quantc.recipe import Recipe
from tests.families import VOCAB, randomize
from tests.helpers import quantize_saved, save_with_tokenizer, thinned
from tests.vision_families import LLAMA, MROPE, TEXT, VISION, VISION_FAMILIES, build_vision, image_inputs

TOKENS = torch.randint(3, VOCAB - 2, (2, 20), generator=torch.Generator().manual_seed(1))
CARRIED = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja")
PRESETS = {"fast": 0.3, "balanced": 0.3, "best": 0.3}  # of the logits, at 4 bits


@pytest.fixture(autouse=True)
def plain_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoTokenizer would wrap some families' own tokenizer class around the test's words."""
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)


def save(name: str, folder: Path) -> PreTrainedModel:
    model = build_vision(name)
    save_with_tokenizer(model, folder / "model")
    for file in CARRIED:
        (folder / "model" / file).write_text(json.dumps({"file": file, "übrig": 1}, ensure_ascii=False), "utf-8")
    (folder / "model/latin.json").write_bytes('{"ü": 1}'.encode("latin-1"))
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(model: PreTrainedModel, packed: PreTrainedModel, name: str, limit: float) -> None:
    """Logits for text alone and for text with an image are near the original's, which depend on the image."""
    seen = image_inputs(name)
    blind = {**seen, "pixel_values": seen["pixel_values"].flip(-1) / 2}
    with torch.no_grad():
        for inputs in ({"input_ids": TOKENS}, seen):
            expected = model(**inputs, use_cache=False).logits
            assert distance(packed(**inputs, use_cache=False).logits, expected) < limit
        assert distance(model(**blind, use_cache=False).logits, expected) > limit


@pytest.mark.parametrize("name", thinned(list(VISION_FAMILIES), every=3))
def test_the_decoder_is_quantized_and_the_tower_stays(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    report = quantize_saved(tmp_path, bits=8, group_size=32)
    decoder = find_decoder(model, lambda _: None, lambda _: None)
    inside = tuple(f"{block}." for block in decoder.blocks)
    assert {linear.name.startswith(inside) for linear in report.linears} == {True}
    assert len(report.linears) == 7 * len(decoder.blocks)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    assert type(packed) is type(model)
    stored = packed.state_dict()
    outside = {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}
    assert all(torch.equal(stored[key], value) for key, value in outside.items())
    assert outside
    check(model, packed, name, 0.03)
    for file in (*CARRIED, "latin.json"):
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_shared_keys_and_values_beside_towers_whose_clipping_bounds_are_infinite(tmp_path: Path) -> None:
    """A tower's buffers may be infinite; the decoder's last blocks read keys and values of earlier ones."""
    text = {**TEXT, "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 3, "num_kv_shared_layers": 1}
    text |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32}
    config = AutoConfig.for_model(
        "gemma4", text_config={**text, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
        vision_config={**VISION, "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64},
        audio_config={**audio, "subsampling_conv_channels": [8, 8]}, image_token_id=VOCAB - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    save_with_tokenizer(model, tmp_path / "model")
    quantize_saved(tmp_path, bits=8, group_size=32)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    infinite = {name: buffer for name, buffer in model.named_buffers() if bool(buffer.isinf().any())}
    assert infinite
    assert all(torch.equal(packed.get_buffer(name), buffer) for name, buffer in infinite.items())
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        assert distance(packed(input_ids=TOKENS, use_cache=False).logits, expected) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_presets(name: str, preset: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    quantize_saved(tmp_path, preset=preset, group_size=32)
    check(model, quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True), name, PRESETS[preset])


def test_a_model_with_a_tower_is_evaluated(tmp_path: Path) -> None:
    save("llava", tmp_path)
    quantize_saved(tmp_path, bits=8, group_size=32, method="rtn")
    text = str(tmp_path / "model/text.txt")
    found = quantc.evaluate(tmp_path / "packed", text=text, against=tmp_path / "model", windows=1, context=32)
    original = quantc.evaluate(tmp_path / "model", text=text, windows=1, context=32)
    assert abs(found.perplexity / original.perplexity - 1) < 0.01
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-3
    assert found.bits_per_weight == pytest.approx(8.5, abs=0.5)
    assert original.bits_per_weight == 32


def test_a_tower_with_more_weights_than_the_decoder_is_not_taken_for_it_nor_read() -> None:
    model = build_vision("llava")
    sizes = {
        name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        for name in ("model.vision_tower.encoder.layers", "model.language_model.layers")
    }
    assert max(sizes, key=sizes.__getitem__) == "model.vision_tower.encoder.layers"
    read: list[str] = []
    graph = derive(model, read.append, lambda _: None)
    assert [block.name for block in graph.blocks] == ["model.language_model.layers.0", "model.language_model.layers.1"]
    assert graph.idle == tuple(f"model.vision_tower.encoder.layers.{index}" for index in range(10))
    assert not [name for name in read if name.startswith("model.vision_tower.encoder.layers")]


def test_blocks_that_tokens_do_not_reach_are_refused() -> None:
    config = AutoConfig.for_model(
        "mllama",
        text_config={**TEXT, "cross_attention_layers": [0], "rope_parameters": MROPE},
        vision_config={**VISION, "num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0],
                       "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(ModelError) as caught:
        derive(model, lambda _: None, lambda _: None)
    assert str(caught.value) == (
        "MllamaSelfAttentionDecoderLayer number 1 was called when number 0 was due, a MllamaCrossAttentionDecoderLayer "
        "that tokens alone may not reach; quantc needs a model that runs its blocks once each, in order."
    )


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    config = AutoConfig.for_model(
        "blip-2", vision_config=VISION, num_query_tokens=4,
        qformer_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        text_config={"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 104,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(ModelError) as caught:
        derive(model, lambda _: None, lambda _: None)
    assert str(caught.value) == (
        "Blip2ForConditionalGeneration failed on tokens alone (TypeError: "
        "Blip2ForConditionalGeneration.forward() missing 1 required positional argument: 'pixel_values'); "
        "quantc needs a decoder that runs on input_ids."
    )


def test_the_residual_stream_of_a_model_with_a_tower_is_not_rotated_by_the_weights(tmp_path: Path) -> None:
    model = save("qwen3_vl", tmp_path)  # adds features of the image to the hidden states between blocks
    passes = [{"allocate": {"bits": 8, "group_size": 32}}, {"rotate": {"residual": "folded"}}, "quantize"]
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    report = quantize_saved(tmp_path, recipe=recipe)
    assert report.refused["rotate residual"] == (
        "the model has other parts than text, which may add to the hidden states between blocks; rotated online instead"
    )
    check(model, quantc.load(tmp_path / "packed", dtype=torch.float32), "qwen3_vl", 0.03)


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("llava", None, AutoModelForImageTextToText),
        ("llama", None, AutoModelForCausalLM),
        ("llama4", None, AutoModelForCausalLM),
        ("llama4", "Llama4ForConditionalGeneration", AutoModelForImageTextToText),
        ("llama4", "Llama4ForCausalLM", AutoModelForCausalLM),
        ("llama4", "SomebodysOwn", AutoModelForCausalLM),
        ("t5gemma2", "T5Gemma2ForConditionalGeneration", AutoModelForCausalLM),  # which refuses it
    ],
)
def test_the_class_is_the_one_that_the_config_names(model_type: str, architecture: str | None, expected: type) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = None if architecture is None else [architecture]
    assert auto_class(config) is expected


def test_a_decoder_alone_loads_without_its_tower(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA), dtype=torch.float32)
    save_with_tokenizer(model, tmp_path / "model")
    assert type(open_model(tmp_path / "model").model) is type(model)


def test_small_files_are_carried_but_not_those_of_weights_and_training(tmp_path: Path) -> None:
    for name in (*CARRIED, "generation_config.json", "preprocessor.json", "chat_template.json"):
        (tmp_path / name).write_text("{}")
    expected = {file.name for file in tmp_path.iterdir()}
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "trainer_state.json", "quantc.json",
                 "all_results.json", "notes.txt", "adapter_config.json", ".hidden.json"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert {file.name for file in model_files(tmp_path)} == expected
