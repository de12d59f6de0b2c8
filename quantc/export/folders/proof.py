"""Whether a written folder holds what it should, by readers that share no code with the writer.

Codes are taken out of the words bit by bit with numpy, as the documents of each container describe them. transformers,
where a reader of the container is installed, computes logits from the whole folder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ...checkpoint.reader import CheckpointReader
from ...errors import CheckpointError
from ...frontend.auto import first_line
from ...frontend.source import quiet_transformers
from ...machine.memory import available_bytes
from ...progress import Progress
from ...runtime.load import read_model, unpacked_values
from ...units import size
from ..probe import Agreement, measure, probe_tokens, tokenizer_of
from .contents import Contents

# Relative error of centred logits in float32. Right folders have 1e-6, and 3e-4 where zero points are read in float16.
MOST_ERROR = 0.01
ROOM = 0.8  # the share of free memory that both models may take
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of output i of eight

Read = Callable[[str], torch.Tensor]


def check_weights(read: Read, contents: Contents, container: str, progress: Progress) -> None:
    """Raise CheckpointError that names the first weight which is not read back as the checkpoint's.

    read: the tensor of a name in the new folder. MLX's biases are products in the scales' dtype, so that weights with
    zero points may be off by what that rounds.
    """
    progress.stage("Reading back", len(contents.entries))
    for name, tensor in contents.packed():
        expected = tensor.dequantize()
        found = torch.from_numpy(DECODERS[container](read, name, tensor.spec.bits, tensor.shape))
        allowed = expected.abs().amax() * 2.0**-8 if container == "mlx" and tensor.zeros is not None else 0.0
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            raise CheckpointError(
                f"{name} is read back from the new folder as other weights, so nothing was written; report this with "
                "the model's name."
            )
        progress.step(name)
    progress.done()


def ask_transformers(
    folder: Path, reader: CheckpointReader, container: str, progress: Progress
) -> tuple[Agreement | None, str]:
    """Return how transformers' logits of the new folder agree with quantc's, or why it was not asked.

    Raises CheckpointError where they differ, or where transformers does not load the folder.
    """
    needed, free = 2 * (reader.weights_bytes() + 4 * _weights(reader)), available_bytes()
    if find_spec(container.replace("-", "_")) is None:
        return None, f"nothing was verified by another runtime: {container} is not installed"
    if needed > ROOM * free:
        short = f"comparing logits needs {size(needed)} of memory, and {size(free)} are free"
        return None, f"nothing was verified by another runtime: {short}"
    progress.stage("Comparing logits", 1)
    model = read_model(reader, torch.float32).eval()
    tokens = probe_tokens(tokenizer_of(reader.folder), model.config)
    expected = _logits(model, tokens)
    del model
    try:
        with quiet_transformers(), redirect_stderr(StringIO()):  # the reader shows progress of its own
            other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found = _logits(other, tokens)
    except Exception as error:
        raise CheckpointError(
            f"transformers does not load the new folder ({first_line(error)}), so it was removed; report this with the "
            "model's name."
        ) from error
    agreement = measure(expected, found, None)
    if not agreement.error <= MOST_ERROR:
        raise CheckpointError(
            f"transformers computes other logits from the new folder than quantc (relative error "
            f"{agreement.error:.3g}), so it was removed; report this with the model's name."
        )
    progress.step("transformers")
    progress.done()
    return agreement, ""


def _weights(reader: CheckpointReader) -> int:
    return unpacked_values(reader) + sum(entry.weights for entry in reader.entries.values())


def _logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    return found


def _numbers(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first `count` numbers of each row's stream of bits, lowest first: words (R, W) of 32 bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def _spread(groups: np.ndarray, k: int) -> np.ndarray:
    """Return values of groups (N, G) for each of k inputs."""
    return np.repeat(groups, -(-k // groups.shape[1]), axis=1)[:, :k]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _decode_compressed_tensors(read: Read, name: str, bits: int, shape: tuple[int, int]) -> np.ndarray:
    n, k = read(f"{name}.weight_shape").tolist()
    codes = _numbers(_array(read(f"{name}.weight_packed")), bits, k)
    scales = _array(read(f"{name}.weight_scale"))
    try:
        zeros = _numbers(_array(read(f"{name}.weight_zero_point")).T, bits, n).T
    except KeyError:
        zeros = np.full(scales.shape, 1 << (bits - 1))
    return ((codes - _spread(zeros, k)) * _spread(scales, k)).astype(np.float32)


def _decode_gptq(read: Read, name: str, bits: int, shape: tuple[int, int]) -> np.ndarray:
    n, k = shape
    codes = _numbers(_array(read(f"{name}.qweight")).T, bits, k)
    zeros = _numbers(_array(read(f"{name}.qzeros")), bits, n).T
    if bool((zeros == (1 << (bits - 1)) - 1).all()):  # version 1, which is written for symmetric codes
        zeros = zeros + 1
    group = _array(read(f"{name}.g_idx"))
    return ((codes - zeros[:, group]) * _array(read(f"{name}.scales")).T[:, group]).astype(np.float32)


def _decode_awq(read: Read, name: str, bits: int, shape: tuple[int, int]) -> np.ndarray:
    n, k = shape
    codes, zeros = (
        _numbers(words.reshape(-1, 1), bits, 8)[:, AWQ_PLACES].reshape(len(words), n).T
        for words in (_array(read(f"{name}.qweight")), _array(read(f"{name}.qzeros")))
    )
    return ((codes - _spread(zeros, k)) * _spread(_array(read(f"{name}.scales")).T, k)).astype(np.float32)


def _decode_mlx(read: Read, name: str, bits: int, shape: tuple[int, int]) -> np.ndarray:
    k = shape[1]
    codes = _numbers(read(f"{name}.weight").view(torch.int32).numpy(), bits, k)
    scales, biases = (_spread(_array(read(f"{name}.{part}")), k) for part in ("scales", "biases"))
    return (codes * scales.astype(np.float64) + biases).astype(np.float32)


DECODERS: dict[str, Callable[[Read, str, int, tuple[int, int]], np.ndarray]] = {
    "compressed-tensors": _decode_compressed_tensors,
    "gptq": _decode_gptq,
    "auto-round": _decode_gptq,
    "awq": _decode_awq,
    "mlx": _decode_mlx,
}
