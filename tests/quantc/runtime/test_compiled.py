"""Compiled decoding: the same text, fewer operators, and attention that equals torch's."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F

import quantc
from quantc.errors import UsageError
from quantc.kernels.cpu import library
from quantc.plan import Plan
from quantc.runtime import compiled, step_graph
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.families import build
from tests.helpers import save_with_tokenizer, thinned

# torch's compiler, when it is imported, uses what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
PROMPTS = torch.tensor([[3, 17, 42, 99, 3, 7], [0, 0, 5, 23, 8, 64]])  # the second is padded on the left
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
FAMILIES = thinned(["llama", "qwen2_moe", "gpt2", "gemma2", "mamba", "phi", "qwen2"], every=4)
native = pytest.mark.skipif(isinstance(library.load(), str), reason="the native kernels were not built")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's 4-bit checkpoint with an 8-bit head, made when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        out = folder / f"{name}-4"
        if not out.exists():
            save_with_tokenizer(build(name), folder / name)
            quantc.quantize(folder / name, bits=4, head_bits=8, group_size=16, method="rtn", out=out)
        return out

    return make


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The rewritten graphs, which run as they are: the C++ that torch would make of them takes a minute."""
    seen: list[fx.GraphModule] = []

    def run_as_it_is(graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", run_as_it_is)
    torch._dynamo.reset()
    return seen


def text(model: Any, count: int = 8) -> list[list[int]]:
    output = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=count, do_sample=False, pad_token_id=0)
    found: list[list[int]] = output[:, PROMPTS.shape[1] :].tolist()
    return found


def targets(graphs: list[fx.GraphModule]) -> list[Any]:
    return [node.target for graph in graphs for node in graph.graph.nodes]


@native
def test_parts_that_change_between_texts_are_seen(packed: Callable[[str], Path], graphs: list[fx.GraphModule]) -> None:
    """The prompt, which is not compiled, prepares them again where the compiled step finds them."""
    plain = quantc.load(packed("llama"), dtype=torch.float32)
    fast = quantc.load(packed("llama"), dtype=torch.float32, compile=True)
    before = text(fast)
    for model in (plain, fast):
        for name, part in model.named_buffers():
            if name.endswith("down_proj.scales"):
                part.neg_()
    assert text(fast) == text(plain)
    assert text(fast) != before


@native
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_gives_the_text_of_the_model_that_is_not_compiled(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule], name: str
) -> None:
    plain = quantc.load(packed(name), dtype=torch.float32)
    fast = quantc.load(packed(name), dtype=torch.float32, compile=True)
    assert text(fast) == text(plain)
    assert text(fast, 12) == text(plain, 12)
    assert graphs


@native
def test_what_reads_the_same_tensor_is_one_call_and_attention_is_open(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule]
) -> None:
    model = quantc.load(packed("llama"), dtype=torch.float32, compile=True)
    text(model)
    blocks = model.config.num_hidden_layers
    found = targets(graphs[:1])
    ops = torch.ops.quantc
    assert found.count(ops.native_step3.default) == found.count(ops.native_step2.default) == blocks  # qkv; gate and up
    assert found.count(ops.native_step1.default) == 2 * blocks + 1  # o and down, and the head
    assert ops.native_matmul not in found
    assert F.scaled_dot_product_attention not in found
    assert found.count(step_graph.attend) == blocks


@native
def test_trellis_weights_are_joined_too(tmp_path: Path, graphs: list[fx.GraphModule]) -> None:
    model = build("llama")
    save_with_tokenizer(model, tmp_path / "llama")
    linears = [
        name
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, torch.nn.Linear)
    ]
    plan = Plan(dict.fromkeys(linears, QuantSpec(3, WHOLE_ROW, code="trellis")))
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    quantc.quantize(tmp_path / "llama", plan=tmp_path / "plan.yaml", method="rtn", out=tmp_path / "out")
    fast = quantc.load(tmp_path / "out", dtype=torch.float32, compile=True)
    assert text(fast) == text(quantc.load(tmp_path / "out", dtype=torch.float32))
    found, ops, blocks = targets(graphs[:1]), torch.ops.quantc, fast.config.num_hidden_layers
    assert found.count(ops.trellis_step3.default) == found.count(ops.trellis_step2.default) == blocks
    assert found.count(ops.trellis_step1.default) == 2 * blocks
    assert ops.trellis_matmul not in found


@native
@pytest.mark.parametrize("name", thinned(["gpt2", "llama", "qwen2"], every=3))
def test_torch_can_keep_what_it_makes_of_the_graph(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule], name: str
) -> None:
    """A node that it does not know how to cache would cost the next process 10 s for SmolLM2-135M."""
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    text(quantc.load(packed(name), dtype=torch.float32, compile=True))
    with torch._inductor.config.patch(compiled._options()):
        for graph in graphs:
            check_cacheable(graph)
    assert step_graph.attend in targets(graphs)


class Told:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.heard.append(f"{name}, {total}")

    def step(self, name: str) -> None:
        self.heard.append(name)

    def linear(self, name: str, error: float) -> None: ...

    def note(self, text: str) -> None: ...

    def done(self) -> None:
        self.heard.append("done")


@native
def test_progress_hears_of_every_compilation_and_of_nothing_else(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule]
) -> None:
    told = Told()
    model = quantc.load(packed("llama"), dtype=torch.float32, compile=True, progress=told)
    text(model, 1)  # the prompt's, which is not compiled
    assert not told.heard
    text(model)
    read = "read the model's code; torch now simplifies it"
    assert told.heard == ["compiling the step that makes a token, 3", read, compiled.FINISHED, "done"]
    text(model)
    assert told.heard.count("done") == len(graphs) == 1
    torch.nn.Module.train(model)
    text(model)
    assert told.heard.count("done") == len(graphs) == 2


@native
def test_without_progress_whoever_waits_sees_log_lines(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    text(quantc.load(packed("llama"), dtype=torch.float32, compile=True))
    lines = [record.getMessage() for record in caplog.records if record.name == "quantc"]
    assert lines[0].startswith("this takes most of a minute, or seconds where ")
    assert lines[-1] == "compiling the step that makes a token done"
    assert {record.levelname for record in caplog.records if record.name == "quantc"} == {"WARNING"}


@native
def test_moving_and_casting_after_compiling(packed: Callable[[str], Path], graphs: list[fx.GraphModule]) -> None:
    fast = quantc.load(packed("llama"), dtype=torch.float32, compile=True)
    text(fast)
    expected = text(quantc.load(packed("llama"), dtype=torch.float32).to(torch.bfloat16))
    assert text(fast.to(torch.bfloat16)) == expected


@native
def test_a_model_that_has_changed_is_compiled_anew_and_each_has_its_own(
    packed: Callable[[str], Path], graphs: list[fx.GraphModule]
) -> None:
    one, two = (quantc.load(packed("llama"), dtype=torch.float32, compile=True) for _ in range(2))
    for name, parameter in two.named_parameters():
        if "norm" in name:
            parameter.data += 0.3
    first, second = text(one), text(two)
    assert text(one) == first != second
    layer = one.model.layers[0].mlp
    layer.down_proj = torch.nn.Sequential(layer.down_proj, torch.nn.Tanh())
    changed = text(one)
    assert changed != first
    assert text(copy.deepcopy(one)) == changed
    assert text(two) == second
    plain = quantc.load(packed("llama"), dtype=torch.float32)
    plain.model.layers[0].mlp.down_proj = torch.nn.Sequential(plain.model.layers[0].mlp.down_proj, torch.nn.Tanh())
    assert text(plain) == changed


@pytest.mark.slow
@native
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_with_torch_s_compiler(packed: Callable[[str], Path], name: str) -> None:
    torch._dynamo.reset()
    plain = quantc.load(packed(name), dtype=torch.float32)
    fast = quantc.load(packed(name), dtype=torch.float32, compile=True)
    assert text(fast, 20) == text(plain, 20)


def test_without_a_c_compiler_it_is_refused(packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed("llama")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError) as caught:
        quantc.load(folder, compile=True)
    assert str(caught.value) == (
        "torch.compile needs a C++ compiler, and neither g++ nor clang++ was found; install one, or load without "
        "compile=True."
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 33)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    masked=st.sampled_from([None, "bool", "float"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_attention_of_one_query_equals_torch_s(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, masked: str | None, scale: float | None
) -> None:
    batch, heads, shared, length, width = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    query = torch.randn(batch, heads * shared, 1, width, generator=generator).to(dtype)
    key, value = (torch.randn(batch, heads, length, width, generator=generator).to(dtype) for _ in range(2))
    mask = None
    if masked:
        seen = torch.rand(batch, 1, 1, length, generator=generator) < 0.7
        seen[..., 0] = True
        mask = seen if masked == "bool" else torch.where(seen, 0.5, -torch.inf).to(dtype)
    given = {"attn_mask": mask, "scale": scale, "enable_gqa": shared > 1}
    wide = None if mask is None or masked == "bool" else mask.double()
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), **{**given, "attn_mask": mask if wide is None else wide}
    )
    found = step_graph.attend(query, key, value, **given)  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (dtype, query.shape)
    allowed = (4 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps) * (1 + exact.abs().max())
    if dtype == torch.float64:
        allowed = torch.tensor(1e-12)
    assert bool(((found.double() - exact).abs() <= allowed).all())


def test_attention_of_more_queries_or_of_one_that_sees_nothing_behind_it_stays(graphs: list[fx.GraphModule]) -> None:
    def attention(query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, key, is_causal=causal)

    run = torch.compile(attention, backend=compiled.backend)
    one, two, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    for query, causal in ((two, False), (one, True)):
        assert torch.equal(run(query, keys, causal), attention(query, keys, causal))
    assert step_graph.attend not in targets(graphs)
