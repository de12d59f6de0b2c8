"""The plan: written, edited, read back, and refused when it does not belong to the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import UsageError
from quantc.graph.blocks import Returns
from quantc.graph.model_graph import Block, Linear, ModelGraph
from quantc.plan import KEEP, Plan, read_plan
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import run_forked, save_with_tokenizer

NAMES = ("h.0.q_proj", "h.0.k_proj", "h.0.down_proj")


def graph() -> ModelGraph:
    linears = tuple(Linear(name, "linear", (8, 16), f"{name}:in") for name in NAMES)
    return ModelGraph((Block(0, "h.0", linears, (), (), (), Returns(None)),), "embed", "head", tied=True)


def whole_plan() -> Plan:
    return Plan(
        {
            "h.0.q_proj": QuantSpec(4, 32),
            "h.0.k_proj": QuantSpec(3, -1, "per_ic", True),
            "h.0.down_proj": None,
            "embed.weight": QuantSpec(8, 64),
        }
    )


def test_the_module_is_also_the_function_that_plans() -> None:
    first = ["", "import quantc.plan", "from quantc.plan import Plan", "import quantc.api"]
    called = "quantc.plan('nowhere', avg_bits=3.5)"
    code = f"import quantc, quantc.errors\ntry: {called}\nexcept quantc.errors.QuantcError as e: print(e)"
    said = run_forked(*(f"{before}\n{code}" for before in first))
    assert len(said) == len(first)
    assert all("nowhere" in line for line in said)
    assert callable(quantc.plan)
    assert quantc.plan.Plan is Plan  # type: ignore[attr-defined]


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return file


def test_yaml_roundtrip_keeps_specs_and_order(tmp_path: Path) -> None:
    plan = whole_plan()
    again = read_plan(write(tmp_path, plan.to_yaml()))
    assert again.specs == plan.specs
    assert list(again.specs) == list(plan.specs)
    assert again.to_yaml() == plan.to_yaml()


def test_a_person_can_read_it() -> None:
    text = whole_plan().to_yaml()
    assert text.startswith(
        "# quantc plan: edit bits, group_size, grouping, symmetric, rank, hadamard or sparsity, or write `keep`."
    )
    assert "h.0.down_proj: keep\n" in text
    assert (
        "h.0.q_proj: {bits: 4, group_size: 32, grouping: per_oc, symmetric: false, rank: 0,\n    hadamard: 0}" in text
    )


def test_an_edited_plan_says_what_was_edited(tmp_path: Path) -> None:
    content = yaml.safe_load(whole_plan().to_yaml())
    content["linears"]["h.0.q_proj"]["bits"] = 6
    content["linears"]["h.0.k_proj"] = KEEP
    content["linears"]["h.0.down_proj"] = {"bits": 2}
    specs = read_plan(write(tmp_path, yaml.safe_dump(content))).specs
    assert specs["h.0.q_proj"] == QuantSpec(6, 32)
    assert specs["h.0.k_proj"] is None
    assert specs["h.0.down_proj"] == QuantSpec(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2\nlinears: {}", "needs `version: 1` and a mapping `linears`"),
        ("- a list", "needs `version: 1` and a mapping `linears`"),
        ("version: 1", "needs `version: 1` and a mapping `linears`"),
        ("version: 1\nlinears: [a]", "needs `version: 1` and a mapping `linears`"),
        ("", "needs `version: 1` and a mapping `linears`"),
        ("version: 1\nlinears: {h.q: 4}", "the entry of h.q is 4, but a spec mapping or `keep` is needed"),
        ("version: 1\nlinears: {h.q: kept}", "the entry of h.q is 'kept', but"),
        ("version: 1\nlinears: {h.q: {bit: 4}}", "h.q: a quantization spec has the unknown key 'bit'"),
        ("version: 1\nlinears: {h.q: {bits: 11}}", "h.q: bits is 11, but codes have 2 to 8 bits"),
        ("version: [", "cannot be read (while parsing"),
        ("version: true\nlinears: {}", "needs `version: 1`"),
        ("version: 1\nlinears: {3: keep}", "the linear 3 has no name in letters; put names into quotes"),
        ("version: 1\nlinears: {2020-01-01: keep}", "has no name in letters"),
        ("version: 1\nlinears: {h.q: {3: 4, bit: 4}}", "h.q: a quantization spec has the unknown key 3"),
        ("version: 1\nlinears: {h.q: {bits: true}}", "bits is True, but codes have 2 to 8 bits"),
        ("version: 1\nlinears: {h.q: {bits: .nan}}", "bits is nan, but codes have 2 to 8 bits"),
        ("version: 1\nlinears: {h.q: {sparsity: .nan}}", "sparsity is nan, but it is a share"),
        ("version: 1\nlinears: {h.q: {sparsity: false}}", "sparsity is False, but it is a share"),
        ("version: 1\nlinears: {h.q: {group_size: .inf}}", "group_size is inf, but a group holds"),
        ("version: 1\nlinears: {h.q: {rank: 1000000000000}}", "rank is 1000000000000, but 2147483647 at most"),
        ("version: 1\nlinears: {h.q: {hadamard: 9999999999}}", "hadamard is 9999999999, but 2147483647 at most"),
        (f"version: 1\nlinears: {{h.q: {{bits: {'9' * 5000}}}}}", "cannot be read (Exceeds the limit"),
        (f"version: 1\nlinears: {{h.q: {{bits: 0x{'9' * 5000}}}}}", "a whole number of more than 128 bits"),
        ("version: 1\nlinears: {h.q: {wide: 3}}", "wide is 3, but it marks rows in hexadecimal"),
        ("version: 1\nlinears: {h.q: {wide: [1, 2]}}", "wide is [1, 2], but it marks rows in hexadecimal"),
        ("version: 1\nlinears: {h.q: {wide: 'xy'}}", "wide is 'xy', but it marks rows in hexadecimal"),
        (f"version: 1\nlinears: {{h.q: {{wide: '{'00' * (1 << 22)}'}}}}", "but it marks rows in hexadecimal"),
        ("version: 1\nlinears: {h.q: [" + "[" * 500 + "]" * 500 + "]}", "lists or mappings inside each other"),
        ("version: 1\nlinears: &a {h.q: *a}", "an alias is inside what it names"),
        ('version: 1\nlinears: {"h\\e[31m\\n.q": 4}', "the entry of h\\x1b[31m .q is 4"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_plan(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the plan .*nowhere\.yaml cannot be read"):
        read_plan(tmp_path / "nowhere.yaml")


def test_a_plan_for_this_model_passes() -> None:
    whole_plan().check(graph(), {"embed.weight"})


def test_an_unknown_linear_is_answered_with_the_nearest_name() -> None:
    plan = whole_plan()
    plan.specs["h.0.q_prj"] = plan.specs.pop("h.0.q_proj")
    with pytest.raises(UsageError) as caught:
        plan.check(graph(), {"embed.weight"})
    assert str(caught.value) == ("the plan names h.0.q_prj, which is no linear of this model; did you mean h.0.q_proj?")


def test_a_name_of_megabytes_is_answered_too() -> None:
    """Looking for the nearest name takes quadratic time."""
    plan = Plan({"q" * 10**6: None})
    with pytest.raises(UsageError, match="is no linear of this model; did you mean"):
        plan.check(graph(), set())


def test_a_rank_above_the_weight_s_own_is_refused() -> None:
    plan = Plan(dict.fromkeys(NAMES, QuantSpec(4, 32, rank=8)))
    plan.check(graph(), set())
    plan.specs[NAMES[1]] = QuantSpec(4, 32, rank=9)
    with pytest.raises(UsageError) as caught:
        plan.check(graph(), set())
    assert "gives h.0.k_proj the rank 9, but a weight of 8 x 16 has rank 8 at most; lower it" in str(caught.value)


def test_a_missing_linear_is_named() -> None:
    plan = whole_plan()
    del plan.specs["h.0.k_proj"], plan.specs["h.0.down_proj"]
    with pytest.raises(UsageError) as caught:
        plan.check(graph(), {"embed.weight"})
    assert str(caught.value) == (
        "the plan leaves out h.0.k_proj and 1 more linears; every linear needs a spec, or `keep`."
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("plan") / "model")


def edited(model: Path, tmp_path: Path, **changes: object) -> Path:
    """The plan that quantc writes for the model, with some linears of block 0 changed."""
    quantc.quantize(model, bits=4, method="rtn", out=tmp_path / "first")
    content = yaml.safe_load((tmp_path / "first/plan.yaml").read_text())
    for leaf, entry in changes.items():
        (name,) = [name for name in content["linears"] if name.startswith("model.layers.0.") and leaf in name]
        content["linears"][name] = entry
    return write(tmp_path, yaml.safe_dump(content, sort_keys=False))


def test_the_plan_in_a_checkpoint_makes_the_same_checkpoint(model: Path, tmp_path: Path) -> None:
    plan = edited(model, tmp_path)
    quantc.quantize(model, plan=plan, method="rtn", out=tmp_path / "again")
    one, two = (CheckpointReader(tmp_path / name).manifest["tensors"] for name in ("first", "again"))
    assert one == two
    assert (tmp_path / "again/plan.yaml").read_text() == (tmp_path / "first/plan.yaml").read_text()


def test_an_edited_plan_is_followed(model: Path, tmp_path: Path) -> None:
    plan = edited(model, tmp_path, q_proj=KEEP, k_proj={"bits": 2, "group_size": 16, "symmetric": True})
    quantc.quantize(model, plan=plan, method="rtn", out=tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    prefix = "model.layers.0.self_attn"
    assert f"{prefix}.q_proj" not in reader.entries
    assert reader.tensor(f"{prefix}.q_proj.weight").dtype == torch.float32
    assert reader.entries[f"{prefix}.k_proj"].spec == QuantSpec(2, 16, symmetric=True)
    assert f"{prefix}.k_proj.zeros" not in reader.weight_map
    quantc.load(tmp_path / "out", verify=True)


def test_a_rank_in_a_plan_takes_error_away(model: Path, tmp_path: Path) -> None:
    errors = []
    for rank in (0, 4):
        folder = tmp_path / f"rank-{rank}"
        folder.mkdir()
        plan = edited(model, folder, q_proj={"bits": 2, "rank": rank})
        report = quantc.quantize(model, plan=plan, method="rtn", out=folder / "out")
        errors.append(next(linear.error for linear in report.linears if linear.name.endswith("q_proj")))
    assert 0 < errors[1] < 0.9 * errors[0]
    packed = quantc.load(tmp_path / "rank-4/out", verify=True)
    assert packed.model.layers[0].self_attn.q_proj.low_rank_a.shape[0] == 4


@pytest.mark.parametrize("setting", [{"rank": 2}, {"hadamard": 4}])
def test_only_linears_in_blocks_have_rotations_and_ranks(model: Path, tmp_path: Path, setting: dict[str, int]) -> None:
    plan = edited(model, tmp_path)
    content = yaml.safe_load(plan.read_text())
    content["linears"]["model.embed_tokens.weight"] = {"bits": 8, "group_size": 16, **setting}
    plan.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match="only linears inside the blocks have them; leave them out"):
        quantc.quantize(model, plan=plan, method="rtn", out=tmp_path / "out")


def test_a_rotation_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    plan = edited(model, tmp_path, q_proj={"bits": 4, "hadamard": 3})
    with pytest.raises(UsageError, match="inputs need blocks that divide them and for which a Hadamard matrix is"):
        quantc.quantize(model, plan=plan, method="rtn", out=tmp_path / "out")


@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
def test_an_embedding_in_a_plan_is_packed_and_read(model: Path, tmp_path: Path, grouping: str) -> None:
    plan = edited(model, tmp_path)
    content = yaml.safe_load(plan.read_text())
    content["linears"]["model.embed_tokens.weight"] = {"bits": 8, "group_size": 9, "grouping": grouping}
    plan.write_text(yaml.safe_dump(content))
    quantc.quantize(model, plan=plan, method="rtn", out=tmp_path / "out")
    packed = quantc.load(tmp_path / "out", dtype=torch.float32, verify=True)
    tokens = torch.tensor([[3, 159, 8, 9, 3]])
    with torch.no_grad():
        found = packed.get_input_embeddings()(tokens)
        expected = build("llama").get_input_embeddings()(tokens)
    assert float((found - expected).norm() / expected.norm()) < 0.01
