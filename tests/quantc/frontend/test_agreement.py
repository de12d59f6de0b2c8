"""What quantc reads is what transformers loads; where config and files disagree it is said or refused at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import quantc
import quantc.api
from quantc.errors import ModelError
from quantc.frontend import open_model
from quantc.frontend.auto import build_skeleton
from tests.families import FAMILIES, build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run
from tests.quantc.frontend.folders import WEIGHTS, edit_config, edit_weights, refusal
from tests.whole.test_families import TOKENS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("qwen2"), tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture
def folder(untied: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untied, tmp_path / "model")


@pytest.fixture
def tied_folder(tied: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tied, tmp_path / "model")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def quantized_logits(folder: Path, out: Path) -> torch.Tensor:
    quantc.quantize(folder, bits=8, method="rtn", out=out)
    return logits(quantc.load(out, dtype=torch.float32))


def test_a_trained_head_is_kept_where_the_config_calls_it_tied(folder: Path, tmp_path: Path) -> None:
    expected = logits(open_model(folder).load_whole(torch.float32))
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(open_model(folder).load_whole(torch.float32)), expected)
    report = quantc.quantize(folder, preset="fast", bits=8, group_size=8, method="rtn", out=tmp_path / "out")
    assert report.notes == [
        f"config.json says that the head is the embedding, but {HEAD} has values of its own; the files are believed, "
        "and the head is stored by itself"
    ]
    found = logits(quantc.load(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert HEAD in json.loads((tmp_path / "out/quantc.json").read_text())["tensors"]


def test_a_copy_of_the_embedding_stays_tied(tied_folder: Path, tmp_path: Path) -> None:
    edit_weights(tied_folder, lambda found: found.update({HEAD: found[EMBEDDING].clone()}))
    report = quantc.quantize(tied_folder, preset="fast", bits=8, group_size=8, method="rtn", out=tmp_path / "out")
    assert report.notes == []
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in json.loads((tmp_path / "out/quantc.json").read_text())["tensors"]


def test_an_embedding_that_is_stored_as_the_head(tied_folder: Path, tmp_path: Path) -> None:
    expected = logits(open_model(tied_folder).load_whole(torch.float32))
    edit_weights(tied_folder, lambda found: found.update({HEAD: found.pop(EMBEDDING)}))
    assert torch.equal(logits(open_model(tied_folder).load_whole(torch.float32)), expected)
    found = quantized_logits(tied_folder, tmp_path / "out")
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_head_that_the_config_asks_for_is_missing(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda found: found.__delitem__(HEAD))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: the model was saved without its head ({HEAD}; LlamaForCausalLM), and config.json does not say that "
        "the head is the embedding; save it with its head, or set tie_word_embeddings to true in config.json."
    )


def test_other_shared_weights_that_differ_are_refused(tmp_path: Path) -> None:
    save_with_tokenizer(build("zamba2"), tmp_path / "model")
    source = open_model(tmp_path / "model")
    name, stored = next((name, stored) for name, stored in source.tied.items() if "layers" in name)
    edit_weights(tmp_path / "model", lambda found: found.update({name: found[stored] + 1}))
    assert refusal(tmp_path / "model", tmp_path / "out") == (
        f"{tmp_path / 'model'}: {name} shares its values with {stored} in this model, but the files hold others; "
        "weights that belong to the config are needed."
    )


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom"])
def test_a_base_model_whose_head_is_the_embedding(name: str, tmp_path: Path) -> None:
    whole = build(name)
    save_with_tokenizer(whole, tmp_path / "whole")
    expected = logits(open_model(tmp_path / "whole").load_whole(torch.float32))
    save_with_tokenizer(whole.base_model, tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["architectures"] == [type(whole.base_model).__name__]
    assert torch.equal(logits(open_model(tmp_path / "base").load_whole(torch.float32)), expected)
    found = quantized_logits(tmp_path / "base", tmp_path / "out")
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama").model, tmp_path / "model")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert f"was saved without its head ({HEAD}; LlamaModel), and config.json does not say" in message
    with pytest.raises(ModelError, match="was saved without its head"):
        quantc.evaluate(tmp_path / "model", text=str(tmp_path / "model/text.txt"), context=16)


def test_tensors_that_the_model_does_not_take_are_listed(folder: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.2.mtp_{part}.weight": torch.ones(2) for part in "abcde"}
    edit_weights(folder, lambda found: found.update(extra))
    assert open_model(folder).notes == [
        "5 tensors of the files are no part of LlamaForCausalLM and were left out: model.layers.2.mtp_a.weight, "
        "model.layers.2.mtp_b.weight, model.layers.2.mtp_c.weight and 2 more"
    ]


def test_buffers_of_older_versions_need_no_note(folder: Path) -> None:
    old = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.attn.bias",
        "model.layers.0.attn.masked_bias",
    )
    edit_weights(folder, lambda found: found.update({name: torch.ones(2) for name in old}))
    assert open_model(folder).notes == []


@pytest.mark.parametrize(
    ("name", "dtype", "extra", "said"),
    [
        (DOWN, torch.float8_e4m3fn, DOWN + "_scale_inv", f"{DOWN} is F8_E4M3, {DOWN}_scale_inv belongs to packed"),
        (DOWN, torch.float8_e5m2, "", f"{DOWN} is F8_E5M2"),
        (DOWN, torch.uint8, DOWN + ".absmax", f"{DOWN} is U8, {DOWN}.absmax belongs to packed"),
        (DOWN, torch.int8, DOWN.replace("weight", "SCB"), f"{DOWN} is I8, {DOWN.replace('weight', 'SCB')} belongs"),
        (DOWN, torch.float16, DOWN.replace("weight", "qweight"), f"{DOWN.replace('weight', 'qweight')} belongs to"),
    ],
)
def test_weights_of_another_quantizer(
    folder: Path, tmp_path: Path, name: str, dtype: torch.dtype, extra: str, said: str
) -> None:
    edit_weights(folder, lambda found: found.update({name: found[name].to(dtype)}))
    if extra:
        edit_weights(folder, lambda found: found.update({extra: torch.ones(2)}))
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder} is already quantized (by another tool: {said}")
    assert message.endswith("but quantc needs float weights; start from the original, unquantized model.")


def test_an_old_gptq_folder(folder: Path, tmp_path: Path) -> None:
    def pack(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.endswith("proj.weight")]:
            del found[name]
            found.update({name.replace("weight", part): torch.ones(2) for part in ("qweight", "qzeros", "scales")})

    edit_weights(folder, pack)
    (folder / "quantize_config.json").write_text("{}")
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: quantize_config.json has no bits, without which the weights cannot be read; use the config that "
        "belongs to the weights."
    )
    (folder / "quantize_config.json").unlink()
    message = refusal(folder, tmp_path / "out")
    assert "is already quantized (by another tool: model.layers.0.mlp.down_proj.qweight belongs to packed" in message


def test_all_that_is_missing_is_counted(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda found: [found.pop(name) for name in list(found) if ".layers.1." in name])
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: the tensor model.layers.1.input_layernorm.weight and 8 more are not in the checkpoint; a complete "
        "checkpoint is needed, so fetch or save the model again."
    )


def test_a_file_without_tensors(folder: Path, tmp_path: Path) -> None:
    save_file({}, folder / WEIGHTS)
    assert " more are not in the checkpoint; a complete checkpoint is needed" in refusal(folder, tmp_path / "out")


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    save_with_tokenizer(build("mixtral"), tmp_path / "model")
    lost = next(name for name in load_file(tmp_path / "model" / WEIGHTS) if ".experts.3." in name)
    edit_weights(tmp_path / "model", lambda found: found.__delitem__(lost))
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert "has the shape (3, " in message or "do not fit together" in message


def test_a_missing_tensor_is_found_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantc.frontend.folder.FolderSource.load", lambda *_: pytest.fail("weights were read"))
    edit_weights(folder, lambda found: found.__delitem__(DOWN))
    with pytest.raises(ModelError, match=f"the tensor {DOWN} is not in the checkpoint"):
        quantc.evaluate(folder, text=str(folder / "text.txt"), context=16)


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gpt_oss", "zamba2", "qwen3_next", "gpt2", "deepseek_v3"])
def test_opening_leaves_the_model_as_it_was_built(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    assert source.notes == []
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in source.model.parameters())
    assert not any(buffer.is_meta for buffer in source.model.buffers())
    fresh = build_skeleton(source.model.config)
    found, expected = ({n: t.shape for n, t in m.state_dict().items()} for m in (source.model, fresh))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_agrees_with_its_own_files(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    assert open_model(tmp_path).notes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, -1])
def test_values_are_checked_before_calibration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, place: int
) -> None:
    def plant(found: dict[str, torch.Tensor]) -> None:
        found[DOWN].view(-1)[place] = torch.inf
        found[DOWN] = found[DOWN].to(dtype)
        found["unused.weight"] = torch.full((3,), torch.nan)

    edit_weights(folder, plant)
    monkeypatch.setattr("quantc.frontend.finite.PIECE", 1 << 10)
    monkeypatch.setattr("quantc.pipeline.sweep.CalibrationRun", lambda *_: pytest.fail("calibration began"))
    settings = {"calib": str(folder / "text.txt"), "samples": 2, "seq_len": 16}
    message = f"{folder}: 1 of {64 * 104} values of {DOWN} are NaN or infinite; quantization needs finite weights, so"
    with pytest.raises(ModelError) as caught:
        quantc.quantize(folder, bits=4, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    with pytest.raises(ModelError) as caught:
        quantc.api.plan(folder, avg_bits=4, **settings)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_eval_tells_what_is_amiss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, tie_word_embeddings=True)
    monkeypatch.setattr("quantc.evaluation.scores.measure_decode_speed", lambda *_: 1.0)
    result = run("eval", str(folder), "--text", str(folder / "text.txt"), "--context", "16")
    assert f"config.json says that the head is the embedding, but {HEAD} has values of its own" in result.stderr


def test_opening_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    try:
        open_model(folder)
    finally:
        transformers_logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
