"""Whether a written file holds what it should, by readers that share no code with the writer.

gguf-py decodes every block, which must give quantc's weights to the bit. llama.cpp computes logits, which must be those
of the checkpoint but for its own rounding: it rounds what a quantized weight is multiplied with to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...errors import CheckpointError
from ...evaluation.llama_cpp import LlamaCpp
from ...frontend.gguf_files import open_reader
from ...progress import Progress
from ..probe import PROBE, Agreement, measure
from .contents import Contents
from .file import gguf_package
from .layout import FileTensor, Verbatim

# Mean KL divergence in nats, and relative error of centred logits. Right files of 30 layers have 0.005 and 0.06, those
# with the rows of queries and keys in the wrong order 0.7 and 0.3, right ones of floats 1e-6 and 7e-4.
MOST_KL, MOST_ERROR = 0.05, 0.2
MOST_ERROR_OF_FLOATS = 0.02


def check_bytes(file: Path, tensors: Sequence[FileTensor], contents: Contents, progress: Progress) -> None:
    """Raise CheckpointError that names the first tensor which gguf-py does not read as quantc's weights, to the bit."""
    read = {tensor.name: tensor for tensor in open_reader(file).tensors}
    progress.stage("Reading back", len(tensors))
    for tensor in tensors:
        found = read.get(tensor.name)
        if found is None or tuple(reversed(found.shape.tolist())) != tensor.shape or len(read) != len(tensors):
            raise _differs(file, tensor.name, "is missing or has another shape")
        _compare(file, tensor, found, contents)
        progress.step(tensor.name)
    progress.done()


def _compare(file: Path, tensor: FileTensor, found: Any, contents: Contents) -> None:
    decode = gguf_package().quants.dequantize
    rows = found.data.reshape(-1, found.data.shape[-1])
    start = 0
    if isinstance(tensor.kind, Verbatim):
        if not all(np.array_equal(rows.reshape(-1).view(np.uint8), part.numpy()) for part in contents.expected(tensor)):
            raise _differs(file, tensor.name, "was read back as other bytes")
        return
    for expected in contents.expected(tensor):
        expected = expected.reshape(-1, tensor.shape[-1])
        decoded = decode(np.asarray(rows[start : start + len(expected)]), found.tensor_type)
        if not torch.equal(torch.from_numpy(np.array(decoded, dtype=np.float32)), expected):
            raise _differs(file, tensor.name, "was read back as other weights")
        start += len(expected)


def _differs(file: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the tensor {name} of the new GGUF file {what}, so nothing was written to {file.parent}; report this with the "
        "model's name."
    )


def check_logits(
    file: Path,
    tensors: Sequence[FileTensor],
    expected: torch.Tensor,
    tokens: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Agreement:
    """Return how llama.cpp's logits for tokens (T,) agree with the expected ones (T, V); raises CheckpointError.

    tokenizer: whose cuts llama.cpp's are compared with, None for no comparison.
    """
    with LlamaCpp(file, len(tokens)) as model:
        found = model.logits(tokens)
        same_tokens = None
        if tokenizer is not None:
            same_tokens = model.tokenize(PROBE) == tokenizer(PROBE, add_special_tokens=False).input_ids
    agreement = measure(expected, found, same_tokens)
    limit = MOST_ERROR if any(tensor.quantized for tensor in tensors) else MOST_ERROR_OF_FLOATS
    if not (agreement.kl <= MOST_KL and agreement.error <= limit):
        raise CheckpointError(
            f"llama.cpp computes other logits from the new GGUF file than quantc (mean KL divergence "
            f"{agreement.kl:.3g} nats, relative error {agreement.error:.3g}), so it was removed; report this with the "
            "model's name."
        )
    return agreement
