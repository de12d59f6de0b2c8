"""What a folder is when it is no decoder language model that quantc can read: one sentence each, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..errors import ModelError
from ..files.untrusted import read_json

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
MERGE = (
    "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), then use "
    "that folder"
)
SAVE = "load the model with transformers and call save_pretrained, then use that folder"
# What a file says of a folder without config.json, first match first: pattern, what the folder is, remedy.
WITHOUT_CONFIG = (
    ("model_index.json", "a diffusers pipeline, not a language model", "pass a decoder language model"),
    ("*.gguf", "a folder of GGUF files", "pass the file itself: {found}"),
    ("params.json", "in the format of its authors' own code", "use the model's transformers version"),
    ("*.distcp", "a distributed training checkpoint", f"merge its shards; {SAVE}"),
    ("*.onnx", "an ONNX model", "use the model it was exported from"),
    ("onnx/*.onnx", "an ONNX model", "use the model it was exported from"),
    ("saved_model.pb", "a TensorFlow model", "use the model's safetensors version"),
)
TOKENIZER_ALONE = (("tokenizer*", "a tokenizer without a model", "pass the model's folder"),)
# The same for a folder with a config.json, but without weights that are read.
WITHOUT_WEIGHTS = (
    ("gptq_model*.safetensors", "stored under AutoGPTQ's name ({found})", "rename that file to model.safetensors"),
    ("model-*-of-*.safetensors", "in shards without model.safetensors.index.json", "fetch that file as well"),
    ("model.*.safetensors", "stored in a variant only ({found})", "rename that file to model.safetensors"),
    ("consolidated*.safetensors", "in the format of its authors' own code ({found})", "fetch model*.safetensors"),
    ("*.gguf", "a folder of GGUF files", "pass the file itself: {found}"),
    ("*.onnx", "an ONNX model", "use the model it was exported from"),
    ("onnx/*.onnx", "an ONNX model", "use the model it was exported from"),
    ("tf_model.h5", "stored as TensorFlow weights ({found})", "use the model's safetensors version"),
    ("*.msgpack", "stored as Flax weights ({found})", "use the model's safetensors version"),
    ("weights*.npz", "stored as MLX arrays ({found})", "use the model's safetensors version"),
    ("*.distcp", "a distributed training checkpoint", f"merge its shards; {SAVE}"),
    ("pytorch_model_fsdp*", "a distributed training checkpoint", f"merge its shards; {SAVE}"),
    ("*.safetensors", "without a model.safetensors (it has {found})", "rename that file if it holds the model"),
)  # fmt: skip
CLASSIFIERS = ("Classification", "RewardModel", "QuestionAnswering", "MultipleChoice", "ForScore")


def refuse_other_folders(folder: Path) -> None:
    """Raise ModelError that says what a folder without a config.json is."""
    if not (folder / "config.json").is_file():
        raise _without_config(folder)


def refuse_fetched_code(folder: Path, config: Any) -> None:
    """Raise ModelError for a config that makes transformers fetch a kernel, which is code, from the hub."""
    for part in (config, config.get_text_config()):
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if "/" in str(getattr(part, key, None)):
                raise ModelError(
                    f"{folder}: config.json asks for the kernel {getattr(part, key)!r}, which is code from the hub "
                    "that is not run unasked; remove that entry, or pass --trust-remote-code (in Python "
                    "trust_remote_code=True)."
                )


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError where an adapter is beside a model: transformers applies it only where peft is installed."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a model and an adapter for it (adapter_config.json), which would be left out; {MERGE}, or "
            "move adapter_config.json away."
        )


def without_weights(folder: Path) -> ModelError:
    """Return the error for a folder with a config.json and none of the weights that are read."""
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles:
        return ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which quantc does not unpickle; safetensors are "
            f"needed, so {SAVE}."
        )
    known = _adapter(folder) or _matching(folder, WITHOUT_WEIGHTS) or _nested(folder)
    return known or ModelError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; safetensors weights are needed, so "
        "fetch or save them."
    )


def check_architecture(folder: Path, config: Any) -> None:
    """Raise ModelError for a config of another kind of model than a decoder that predicts the next token."""
    named = next(iter(config.architectures or []), "")
    if _causal_class(config) == named != "":
        return
    needed = "a decoder model that AutoModelForCausalLM knows is needed"
    if config.is_encoder_decoder:
        raise ModelError(f"{folder} is an encoder-decoder model ({named or config.model_type}); {needed}.")
    if any(word in named for word in CLASSIFIERS):
        raise ModelError(
            f"{folder} is a reward or classification model ({named}), whose head scores texts and predicts no tokens; "
            f"{needed}: use the model that it was trained from."
        )
    encoder = getattr(config, "is_decoder", None) is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if encoder or "MaskedLM" in named:
        raise ModelError(
            f"{folder} is a text encoder ({named or config.model_type}), in which every token sees the whole text; "
            f"{needed}."
        )


def _causal_class(config: Any) -> str:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(found, "__name__", "")


def _without_config(folder: Path) -> ModelError:
    known = _adapter(folder) or _hub_cache(folder) or _matching(folder, WITHOUT_CONFIG) or _nested(folder)
    if not any(folder.glob("*.safetensors")):
        known = known or _matching(folder, TOKENIZER_ALONE)
    return known or ModelError(
        f"{folder} has no config.json; a transformers model folder (config.json, tokenizer, safetensors weights) or a "
        ".gguf file is needed."
    )


def _adapter(folder: Path) -> ModelError | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = read_json(file)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "an unnamed model"
    return ModelError(f"{folder} is an adapter for {base}, not a model; {MERGE}.")


def _hub_cache(folder: Path) -> ModelError | None:
    found = sorted((folder / "snapshots").glob("*/config.json"))
    if not found:
        return None
    return ModelError(f"{folder} is a model's folder in the hub's cache; pass the snapshot in it, {found[-1].parent}.")


def _matching(folder: Path, table: tuple[tuple[str, str, str], ...]) -> ModelError | None:
    for pattern, kind, remedy in table:
        found = sorted(folder.glob(pattern))
        if found:
            names = {"found": found[0].relative_to(folder)}
            return ModelError(f"{folder} is {kind.format(**names)}; {remedy.format(**names)}.")
    return None


def _nested(folder: Path) -> ModelError | None:
    found = [path.parent for path in sorted(folder.glob("*/config.json")) if any(path.parent.glob("*.safetensors"))]
    if not found:
        return None
    return ModelError(
        f"{folder} holds no model itself, but {len(found)} folders with one; pass one of them, such as {found[0]}."
    )
