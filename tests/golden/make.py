"""Makes the golden checkpoints of the format's versions that are not there yet; the tests only read.

    python -m tests.golden.make

A one-block Llama of width 32 with random weights, quantized by a hand-made plan that mixes what the dense format
can store; in version 2 its residual stream is rotated too, in version 3 some linears have rows of two widths, or groups
of which some are dropped, or drop two of four weights (v3_sparse), and in version 4 all are on block types of
GGUF, or on tables of values (v4_tables), and in version 5 most have trellis codes.
`expected_<version>.json` keeps, per packed weight, a hash of its dequantized float32 values and a few of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.formats import format_of
from quantc.plan import Plan
from quantc.recipe import Recipe
from quantc.spec import GRIDS, WHOLE_ROW, Fixed, QuantSpec
from tests.helpers import save_with_tokenizer

HERE = Path(__file__).parent
BLOCK = "model.layers.0"
PLAN = Plan(
    {
        f"{BLOCK}.self_attn.q_proj": QuantSpec(4, 16),
        f"{BLOCK}.self_attn.k_proj": QuantSpec(3, 32, symmetric=True),
        f"{BLOCK}.self_attn.v_proj": QuantSpec(2, 8, "per_ic"),
        f"{BLOCK}.self_attn.o_proj": QuantSpec(5, 10),
        f"{BLOCK}.mlp.gate_proj": QuantSpec(6, WHOLE_ROW, "per_ic", True),
        f"{BLOCK}.mlp.up_proj": None,
        f"{BLOCK}.mlp.down_proj": QuantSpec(7, WHOLE_ROW),
        "model.embed_tokens.weight": QuantSpec(8, 32),
    }
)


PLAN_3 = Plan(
    {
        **PLAN.specs,
        f"{BLOCK}.self_attn.q_proj": QuantSpec(4, 16, wide_rows=7),
        f"{BLOCK}.self_attn.k_proj": QuantSpec(3, 32, symmetric=True, wide_rows=15),
        f"{BLOCK}.mlp.up_proj": QuantSpec(2, WHOLE_ROW, hadamard=32, wide_rows=1),
    },
    salience={
        f"{BLOCK}.self_attn.q_proj": torch.arange(32) * 5 % 32,
        f"{BLOCK}.self_attn.k_proj": torch.arange(16),
        f"{BLOCK}.mlp.up_proj": torch.arange(44),
    },
)


PLAN_SPARSE = Plan(
    {
        **PLAN.specs,
        f"{BLOCK}.self_attn.q_proj": QuantSpec(4, 8, sparsity=0.5),
        f"{BLOCK}.self_attn.k_proj": QuantSpec(3, 8, symmetric=True, sparsity=0.3),
        f"{BLOCK}.self_attn.o_proj": QuantSpec(4, 32, two_of_four=True),
        f"{BLOCK}.mlp.up_proj": QuantSpec(2, 16, hadamard=32, sparsity=0.9),
        f"{BLOCK}.mlp.down_proj": QuantSpec(5, 16, sparsity=0.25),
    }
)


def spec_of(code: str) -> QuantSpec:
    grid = GRIDS[code]
    assert issubclass(grid, Fixed)
    return QuantSpec(grid.width, grid.block, code=code)


SIMPLE = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), ("q4_0", "q4_1", "q5_0", "q5_1"), strict=True))
NESTED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
PLAN_BLOCKS = Plan(
    {
        f"model.layers.{index}.{name}": code and spec_of(code)
        for index, nested in enumerate(NESTED)
        for name, code in {
            **{f"self_attn.{name}": code for name, code in SIMPLE.items()},
            "mlp.gate_proj": "q8_0", "mlp.up_proj": None, "mlp.down_proj": nested,
        }.items()
    }
)  # fmt: skip


PLAN_TABLES = Plan(
    {
        f"{BLOCK}.self_attn.q_proj": QuantSpec(4, 10, code="nf4"),
        f"{BLOCK}.self_attn.k_proj": QuantSpec(4, 16, "per_ic", code="nf4_dq"),
        f"{BLOCK}.self_attn.v_proj": spec_of("nvfp4"),
        f"{BLOCK}.self_attn.o_proj": spec_of("mxfp4"),
        f"{BLOCK}.mlp.gate_proj": QuantSpec(4, 8, code="nf4_dq"),
        f"{BLOCK}.mlp.up_proj": QuantSpec(8, WHOLE_ROW, code="fp8"),
        f"{BLOCK}.mlp.down_proj": spec_of("iq4_xs"),
        "model.layers.1.self_attn.q_proj": QuantSpec(4, 8, sparsity=0.5, code="nf4"),
        "model.layers.1.self_attn.k_proj": QuantSpec(8, 16, two_of_four=True, code="fp8"),
        "model.layers.1.self_attn.v_proj": QuantSpec(4, 9, "per_ic", hadamard=32, code="nf4"),
        "model.layers.1.self_attn.o_proj": QuantSpec(4, 32, hadamard=32, code="mxfp4"),
        **{f"model.layers.1.mlp.{name}": QuantSpec(4, WHOLE_ROW, code="nf4_dq") for name in ("gate_proj", "up_proj")},
        "model.layers.1.mlp.down_proj": QuantSpec(8, 100, code="fp8"),
        "model.embed_tokens.weight": spec_of("iq4_nl"),
    }
)


PLAN_TRELLIS = Plan(
    {
        **PLAN.specs,
        f"{BLOCK}.self_attn.q_proj": QuantSpec(3, WHOLE_ROW, code="trellis"),
        f"{BLOCK}.self_attn.k_proj": QuantSpec(1, WHOLE_ROW, code="trellis"),
        f"{BLOCK}.self_attn.o_proj": QuantSpec(4, WHOLE_ROW, code="trellis"),
        f"{BLOCK}.mlp.gate_proj": QuantSpec(5, WHOLE_ROW, hadamard=32, code="trellis"),
        f"{BLOCK}.mlp.up_proj": QuantSpec(2, WHOLE_ROW, hadamard=32, wide_rows=64, code="trellis"),
    },
    salience={f"{BLOCK}.mlp.up_proj": torch.arange(96) * 5 % 96},
)


def build_tiny(layers: int = 1, intermediate: int = 44) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama", vocab_size=160, hidden_size=32, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(torch.bfloat16)


PLAN_ROTATED = Plan(
    {
        **PLAN.specs,
        f"{BLOCK}.mlp.gate_proj": QuantSpec(6, 16, hadamard=16),
        f"{BLOCK}.mlp.up_proj": QuantSpec(3, 32, symmetric=True, hadamard=32),
        f"{BLOCK}.mlp.down_proj": QuantSpec(7, WHOLE_ROW, hadamard=4),
    }
)


def unpacked_weights(folder: Path) -> dict[str, torch.Tensor]:
    """weight -> float32 (N, K), what its codes stand for."""
    reader = CheckpointReader(folder)
    return {
        name: format_of(entry.spec)
        .unpack({part: reader.tensor(f"{name}.{part}") for part in entry.layout()}, entry.spec, entry.shape)
        .dequantize()
        for name, entry in reader.entries.items()
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def make(version: str, passes: list[object], plan: Plan = PLAN, **shape: int) -> None:
    """Quantize the tiny model by a plan and keep the folder and what its codes stand for."""
    folder = HERE / version
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    # Relative paths, because the checkpoint keeps those it was made from.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        save_with_tokenizer(build_tiny(**shape), Path("tiny"))
        Path("plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
        quantc.quantize(
            "./tiny", plan="plan.yaml", recipe=recipe, calib="tiny/text.txt", samples=8, seq_len=32, out=version
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(version, folder)
    expected = {
        name: {"sha256": digest(weight), "shape": list(weight.shape), "first": weight[0, :4].tolist()}
        for name, weight in unpacked_weights(folder).items()
    }
    (HERE / f"expected_{version}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    if not (HERE / "v1").exists():
        make("v1", ["allocate", "quantize"])
    if not (HERE / "v2").exists():
        make("v2", [{"rotate": {"residual": "folded", "value": "folded"}}, "quantize"])
    if not (HERE / "v3").exists():
        make("v3", ["allocate", "quantize"], PLAN_3)
    if not (HERE / "v3_sparse").exists():
        make("v3_sparse", ["allocate", "quantize"], PLAN_SPARSE)
    if not (HERE / "v4").exists():
        make("v4", ["allocate", "quantize"], PLAN_BLOCKS, layers=len(NESTED), intermediate=256)
    if not (HERE / "v4_tables").exists():
        make("v4_tables", ["allocate", "quantize"], PLAN_TABLES, layers=2, intermediate=256)
    if not (HERE / "v5").exists():
        make("v5", ["allocate", "quantize"], PLAN_TRELLIS, intermediate=96)
    if not (HERE / "v6").exists():
        make("v6", ["allocate", "quantize"], PLAN_ROTATED)
