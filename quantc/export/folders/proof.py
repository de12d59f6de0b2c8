"""Whether a written folder holds what it should, by readers that share no code with the writer.

quantc reads the folder as it reads those of other tools (frontend/quantized), which are held against these tools' own
packages; MLX's, of which it has no reader, with numpy. transformers, where it reads the container, computes logits.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ...checkpoint.reader import CheckpointReader
from ...errors import CheckpointError, ModelError, in_one_sentence
from ...frontend.auto import auto_class, first_line
from ...frontend.folder import FolderSource
from ...frontend.source import quiet_transformers
from ...numerics.qtensor import QTensor
from ...planning.targets import NVFP4
from ...progress import Progress
from ...runtime.load import read_model, unpacked_values
from ..probe import Agreement, logits_of, measure, probe_tokens, short_of_memory, tokenizer_of
from .contents import Contents
from .places import Place

# Relative error of centred logits in float32. Right folders have 1e-6, and 3e-4 where zero points are read in float16.
MOST_ERROR = 0.01


def check_weights(folder: Path, contents: Contents, container: str, progress: Progress) -> None:
    """Raise CheckpointError that names the first weight which is not read back as the checkpoint's.

    MLX's biases are products in the scales' dtype, so that weights with zero points may be off by what that rounds;
    what scales of NVFP4 are divided by is the inverse of what quantc multiplies them by. Rotations round.
    """
    read = _Mlx(folder) if container == "mlx" else _Quantized(folder)
    progress.stage("Reading back", len(contents.places))
    for place, tensor in contents.packed():
        name, expected = place.name, tensor.effective_weight()
        found = read.weight(place, tensor)
        allowed = torch.tensor(0.0)
        if container == "mlx" and tensor.zeros is not None:
            allowed = expected.abs().amax() * 2.0**-8
        elif tensor.spec.code == NVFP4:
            allowed = expected.abs() * 2.0**-22
        if tensor.spec.hadamard:  # rotated back by another product than the checkpoint's
            allowed = allowed + expected.abs().amax() * 2.0**-20
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            raise CheckpointError(
                f"{name} is read back from the new folder as other weights, so nothing was written; report this with "
                "the model's name."
            )
        progress.step(name)
    progress.done()


class _Quantized:
    """The weights of a folder as quantc reads those that other tools have quantized."""

    def __init__(self, folder: Path):
        try:
            weights = FolderSource(folder).quantized
        except ModelError as error:
            raise CheckpointError(
                f"the new folder is not read back ({str(error).removesuffix('.')}), so nothing was written; report "
                "this with the model's name."
            ) from error
        assert weights is not None
        self._weights = weights

    def weight(self, place: Place, _: QTensor) -> torch.Tensor:
        key = f"{place.name}.weight"
        found: torch.Tensor = self._weights.tensors([key])[key][...]
        return found


class _Mlx:
    """The weights of a folder as MLX's documents describe them: scales * code + biases."""

    def __init__(self, folder: Path):
        shards = [safe_open(file, framework="pt") for file in folder.glob("*.safetensors")]
        self._shards = {name: shard for shard in shards for name in list(shard.keys())}

    def _read(self, place: Place, part: str) -> torch.Tensor:
        name = f"{place.stack}.{part}"
        if place.rows is None:
            found: torch.Tensor = self._shards[name].get_tensor(name)
            return found
        return self._shards[name].get_slice(name)[place.rows.expert]

    def weight(self, place: Place, tensor: QTensor) -> torch.Tensor:
        (n, k), bits = tensor.shape, tensor.spec.bits
        words = self._read(place, "weight").contiguous().view(torch.int32).numpy()
        stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : k * bits]
        codes = stream.reshape(n, k, bits) @ (1 << np.arange(bits))
        scales, biases = (self._read(place, part).double().numpy() for part in ("scales", "biases"))
        group = k // scales.shape[1]
        values = codes * scales.repeat(group, axis=1) + biases.repeat(group, axis=1)
        return torch.from_numpy(values.astype(np.float32))


def ask_transformers(
    folder: Path, reader: CheckpointReader, container: str, progress: Progress
) -> tuple[Agreement | None, str]:
    """Return how transformers' logits of the new folder agree with quantc's, or why it was not asked.

    Raises CheckpointError where they differ, or where transformers does not load the folder.
    """
    if find_spec(container.replace("-", "_")) is None:
        return None, f"nothing was verified by another runtime: {container} is not installed"
    if (short := short_of_memory(reader.weights_bytes() + 2 * 4 * _weights(reader))) is not None:
        return None, f"nothing was verified by another runtime: {short}"
    progress.stage("Comparing logits", 1)
    model = read_model(reader, torch.float32).eval()
    tokens = probe_tokens(tokenizer_of(reader.folder), model.config.get_text_config())
    expected, auto = logits_of(model, tokens), auto_class(model.config)
    del model
    with quiet_transformers(), redirect_stderr(StringIO()), in_one_sentence(_not_loaded):  # the reader shows progress
        other = auto.from_pretrained(folder, dtype=torch.float32).eval()
        found = logits_of(_decompressed(other), tokens)
    agreement = measure(expected, found, None)
    if not agreement.error <= MOST_ERROR:
        raise CheckpointError(
            f"transformers computes other logits from the new folder than quantc (relative error "
            f"{agreement.error:.3g}), so it was removed; report this with the model's name."
        )
    progress.step("transformers")
    progress.done()
    return agreement, ""


def _decompressed(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the weights that its first call would unpack, small floats into bfloat16, in float32."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)
    return nn.Module.float(model)  # transformers' own refuses quantized models


def _not_loaded(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers does not load the new folder ({first_line(error)}), so it was removed; report this with the "
        "model's name."
    )


def _weights(reader: CheckpointReader) -> int:
    return unpacked_values(reader) + sum(entry.weights for entry in reader.entries.values())
