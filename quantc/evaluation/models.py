"""A quantized checkpoint or an original, whichever a path names: opened, loaded, and how large it is on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.reader import CheckpointReader, is_checkpoint
from ..frontend import Source, open_model, to_meta
from ..frontend.auto import read_tokenizer
from ..frontend.bounds import context_limit
from ..frontend.source import PathLike, tensors_under
from ..graph.decoder import find_decoder
from ..machine.compute_dtype import HALF, Choice, choose_dtype
from ..progress import Progress
from ..runtime.half_weights import keep_half
from ..runtime.load import read_model, stored_dtype, unpacked_values

Opened = Source | PathLike


def open_any(model: PathLike, trusted: bool, progress: Progress | None = None) -> Opened:
    """Return a checkpoint's folder as it is, anything else opened, with a note to the progress on what is amiss."""
    if is_checkpoint(model):
        return model
    source = open_model(model, trusted)
    if progress is not None:
        for note in source.notes:
            progress.note(note)
    return source


def tokenizer_of(opened: Opened, trusted: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an opened model; raises ModelError where there is none."""
    return opened.tokenizer if isinstance(opened, Source) else read_tokenizer(Path(opened), trusted)


def choose_common(models: list[Opened], device: torch.device) -> Choice:
    """Choose the dtype that models are computed in: one for all, or they could not be compared.

    Of models that are stored in different dtypes it is the one that holds the values of all. Two are in memory at a
    time: the first, and each of the others.
    """
    facts = [_stored_floats(model) for model in models]
    common = facts[0][0]
    for other, _ in facts[1:]:
        common = torch.promote_types(common, other)
    return choose_dtype(common, device, facts[0][1] + max((values for _, values in facts[1:]), default=0))


def _stored_floats(model: Opened) -> tuple[torch.dtype, int]:
    """Return the dtype that a model's floats are stored in, and how many of them memory holds."""
    if isinstance(model, Source):
        return _source_dtype(model), sum(math.prod(tensor.shape) for tensor in model.model.parameters())
    reader = CheckpointReader(model)
    return stored_dtype(reader.config), unpacked_values(reader)


def load_any(opened: Opened, dtype: torch.dtype, trusted: bool, device: torch.device) -> Any:
    """Return the model in memory on a device, for evaluation."""
    if isinstance(opened, Source):
        with opened.unchanged:
            whole: Any = opened.load_whole(dtype)
        return whole.to(device)
    reader = CheckpointReader(opened)
    model: Any = read_model(reader, dtype, trusted=trusted).eval()
    if device.type == "cpu":
        keep_half(model, stored_dtype(reader.config))
    return model.to(device)


def stored_size(opened: Opened) -> dict[str, Any]:
    """Return bits_per_weight of the linears inside the blocks, and the size of the weight files."""
    if not isinstance(opened, Source):
        reader = CheckpointReader(opened)
        return {"bits_per_weight": reader.bits_per_weight(), "weights_bytes": reader.weights_bytes()}
    size = sum(file.stat().st_size for file in opened.weight_files())
    return {"bits_per_weight": _source_bits_per_weight(opened), "weights_bytes": size}


def _source_dtype(source: Source) -> torch.dtype:
    """Return the dtype that the config asks for, or that of the first weight, as transformers does."""
    dtype = source.model.config.dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    first = source.stored_dtype(next(name for name, _ in source.model.named_parameters()))
    return first if first in HALF else torch.float32


def _source_bits_per_weight(source: Source) -> float:
    """Return the average over the matrices inside the blocks of an unquantized model."""
    bits = weights = 0.0
    for block in find_decoder(source.model, source.load, to_meta).blocks:
        for name, tensor in tensors_under(source.model, block):
            if tensor.ndim >= 2:
                bits += source.stored_bits(name) * tensor.numel()
                weights += tensor.numel()
    return bits / weights


def default_context(model: PreTrainedModel) -> int:
    """Return 512 tokens, or as many as the model has positions."""
    return min(512, context_limit(model.config) or 512)
