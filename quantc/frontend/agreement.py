"""Compares a model with the headers of its files before anything is read, as transformers would load them.

transformers fills what is missing with random values, leaves out what it does not know, and reports both in a log that
quantc keeps off the screen. Here the same conversion runs on tensors without values, and what it reports is judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import ModelError
from ..machine.dtypes import DTYPES, FLOATS
from .weight_files import Header, open_shard, some

# transformers 5.10 still takes the tensor-parallel plan here; later ones keep it on the model.
OLDER_ARGUMENTS = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
# Last parts of names that quantizers give to what belongs to packed or float8 weights.
QUANTIZED_PARTS = frozenset(
    (
        "qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_scale_2", "scale_inv",
        "weight_zero_point", "weight_packed", "weight_shape", "weight_blocks", "weight_scales", "absmax", "quant_map",
        "nested_absmax", "nested_quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB", "codebooks", "codes",
    )
)  # fmt: skip
# Buffers of older versions that models compute for themselves: rotary tables, masks, positions.
HARMLESS = re.compile(r"(^|\.)((original_)?inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
ROWS = 1 << 14  # of two tables compared at a time


def check_agreement(
    path: Path,
    model: PreTrainedModel,
    conversions: list[Any],
    targets: Mapping[str, str],
    headers: Mapping[str, Header],
) -> list[str]:
    """Return notes on what the files hold that the model does not take; harmless leftovers have none.

    model: on the meta device, left as it was. conversions: transformers' for it. targets: stored tensor -> the first
    model tensor that is made from it. Raises ModelError that names the first tensor for files that lack some, have
    other shapes, or hold weights of another quantizer.
    """
    with _unchanged(model):
        info = _load_without_values(model, conversions, headers)
    unexpected = sorted(name for name in info.unexpected_keys if not HARMLESS.search(name))
    _refuse_quantized(path, model, unexpected, targets, headers)
    _refuse_mismatched(path, info.mismatched_keys)
    for name, reason in sorted(info.conversion_errors.items()):
        raise ModelError(
            f"{path}: the files' tensors for {name} do not fit together ({reason.strip().splitlines()[-1]}); a "
            "complete checkpoint is needed, so fetch or save the model again."
        )
    _refuse_missing(path, model, _missing(model, info.missing_keys))
    if not unexpected:
        return []
    count = f"{len(unexpected)} tensor{'s' * (len(unexpected) > 1)}"
    return [f"{count} of the files are no part of {type(model).__name__} and were left out: {some(unexpected)}"]


def differing_ties(tied: Mapping[str, str], keys: Mapping[str, str], headers: Mapping[str, Header]) -> list[str]:
    """Return names of tensors that the model shares with another, but for which the files have values of their own.

    tied: tensor -> the one it shares. keys: model tensor -> the name it is stored under.
    """
    return [
        name
        for name, stored in tied.items()
        if name in keys and stored in keys and not _equal(keys[name], keys[stored], headers)
    ]


def _load_without_values(model: PreTrainedModel, conversions: list[Any], headers: Mapping[str, Header]) -> Any:
    empty = {
        key: torch.empty(header.shape, dtype=DTYPES.get(header.dtype, torch.float32), device="meta")
        for key, header in headers.items()
    }
    settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=conversions, device_map={"": "meta"})
    return convert_and_load_state_dict_in_model(model, empty, settings, **OLDER_ARGUMENTS)[0]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give every module its parameters and buffers back at the end of the context."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _missing(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return the names that have no source: a shared tensor may come under any of its names."""
    lost = set(names)
    groups: dict[str, set[str]] = {}
    for name, stored in model.all_tied_weights_keys.items():
        groups.setdefault(stored, {stored}).add(name)
    for group in groups.values():
        lost -= group if group - lost else group - {min(group & groups.keys())}
    made = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    made_here = {name for name, _ in model.named_buffers() if any(pattern.search(name) for pattern in made)}
    return sorted(lost - made_here)


def _refuse_missing(path: Path, model: PreTrainedModel, missing: list[str]) -> None:
    if not missing:
        return
    head = model.get_output_embeddings()
    if all(model.get_submodule(name.rpartition(".")[0]) is head for name in missing):
        architecture = next(iter(model.config.architectures or []), "no architecture is named")
        raise ModelError(
            f"{path}: the model was saved without its head ({missing[0]}; {architecture}), and config.json does not "
            "say that the head is the embedding; save it with its head, or set tie_word_embeddings to true in "
            "config.json."
        )
    more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
    raise ModelError(
        f"{path}: the tensor {missing[0]}{more} not in the checkpoint; a complete checkpoint is needed, so fetch or "
        "save the model again."
    )


def _refuse_mismatched(path: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    found = sorted((name, tuple(stored), tuple(needed)) for name, stored, needed in mismatched)
    if found:
        name, stored, needed = found[0]
        more = f", and {len(found) - 1} more differ" if len(found) > 1 else ""
        raise ModelError(
            f"{path}: {name} has the shape {stored}, but config.json describes {needed}{more}; a config that belongs "
            "to the weights is needed."
        )


def _refuse_quantized(
    path: Path, model: PreTrainedModel, unexpected: list[str], targets: Mapping[str, str], headers: Mapping[str, Header]
) -> None:
    """Raise ModelError for codes in place of weights, and for scales that the model does not take."""
    known = model.state_dict()
    floats = {name for name, tensor in known.items() if tensor.is_floating_point()}
    codes = [key for key, header in headers.items() if header.dtype not in FLOATS and targets[key] in floats]
    signs = [f"{key} is {headers[key].dtype}" for key in codes[:1]]
    signs += [f"{name} belongs to packed weights" for name in unexpected if name.rpartition(".")[2] in QUANTIZED_PARTS]
    if not signs:
        return
    signs = signs[:2] + [name for name in ("quantize_config.json", "quant_config.json") if (path / name).is_file()]
    raise ModelError(
        f"{path} is already quantized (by another tool: {', '.join(signs)}), but quantc needs float weights; start "
        "from the original, unquantized model."
    )


def _equal(one: str, other: str, headers: Mapping[str, Header]) -> bool:
    """Return whether two stored tables are equal; compared in bands of rows, so that neither is held whole.

    One that is packed counts as different.
    """
    if headers[one].shape != headers[other].shape or headers[one].packed or headers[other].packed:
        return False
    first, second = (open_shard(headers[key].file).get_slice(key) for key in (one, other))
    rows = headers[one].shape[0]
    bands = (slice(start, min(rows, start + ROWS)) for start in range(0, rows, ROWS))
    return all(torch.equal(first[band].float(), second[band].float()) for band in bands)
