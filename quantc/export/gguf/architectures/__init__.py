"""The architectures that quantc writes to GGUF, one file each. `ARCHITECTURES` is the one list of them."""

from __future__ import annotations

from typing import Any

from ....errors import ModelError
from .base import SLIDING, Architecture, Tensor, full_rope, unlike
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .granite import GRANITE
from .llama import LLAMA
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3moe import QWEN3_MOE

ARCHITECTURES = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GRANITE, OLMO2, GPT2, MIXTRAL)
USUAL_ROPE = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}  # of yarn


def check_type(model_type: object) -> Architecture:
    """Return the architecture of a type of transformers models; raises ModelError where there is none."""
    known = {kind: architecture for architecture in ARCHITECTURES for kind in architecture.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise ModelError(
            f"the model is of type {model_type}, which quantc does not write to GGUF; it writes "
            f"{', '.join(sorted(known))}, and all that was quantized from a GGUF file."
        )
    return known[model_type]


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a config; raises ModelError that names what cannot be written."""
    architecture = check_type(config.model_type)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    if activation not in architecture.activations:
        raise unlike(config, "the activation", activation, " or ".join(architecture.activations))
    _check_rope(config, architecture)
    architecture.check(config)
    return architecture


def _check_rope(config: Any, architecture: Architecture) -> None:
    rope = full_rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in architecture.ropes:
        raise unlike(config, "rope scaling", kind, " or ".join(architecture.ropes))
    for name, usual in USUAL_ROPE.items() if kind == "yarn" else ():
        if rope.get(name, usual) != usual:
            raise unlike(config, f"rope scaling with {name}", rope[name], usual)


def window_of(config: Any, architecture: Architecture) -> int | None:
    """Return the sliding window that a model attends in where llama.cpp does not, None where there is none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (kinds is None or SLIDING in kinds)
    return window if window and used and not architecture.windows else None


__all__ = ["ARCHITECTURES", "Architecture", "Tensor", "architecture_of", "check_type", "window_of"]
