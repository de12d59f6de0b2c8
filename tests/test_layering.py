"""Who may import whom, read from the source; nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOUNTED = ("passes", "kernels", "calib_data")
FILES = {
    ".".join(["quantc", *path.relative_to(ROOT if top != "quantc" else ROOT / "quantc").with_suffix("").parts]): path
    for top in ("quantc", *MOUNTED)
    for path in sorted((ROOT / top).rglob("*.py"))
}
# A part is a module or a folder right under quantc.
PURE = {"errors", "spec", "qtensor", "formats", "numerics"}
HEAVY = {"transformers", "cupy", "safetensors", "accelerate", "datasets", "gguf"}
# GGUF files are told apart by their architecture, and demo models have names.
MAY_NAME_FAMILIES = {"quantc.frontend.gguf", "quantc.frontend.resolve"}
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen", "gemma", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon",
    "stablelm", "olmo", "granite", "cohere", "starcoder", "deepseek", "mamba", "smollm", "glm", "nemotron",
)  # fmt: skip


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def package_of(module: str) -> list[str]:
    parts = module.split(".")
    return parts[:-1]


def imports_of(module: str, everywhere: bool = True) -> Iterator[str]:
    """Full names of what a module imports; inside functions too, except under TYPE_CHECKING."""
    tree = parse(module)
    for node in walk(tree, everywhere):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package_of(module)[: -(node.level - 1) or None] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def walk(node: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if not everywhere and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from walk(child, everywhere)


def parts_imported(module: str, everywhere: bool = True) -> set[str]:
    """The parts of quantc that a module imports, its own folder left out."""
    own = module.split(".")[1]
    inside = [name.split(".") for name in imports_of(module, everywhere) if name.split(".")[0] == "quantc"]
    return {name[1] for name in inside if len(name) > 1 and name[1] != own}


def libraries_imported(module: str, everywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports_of(module, everywhere)}


def modules_under(*parts: str) -> list[str]:
    return [name for name in FILES if name.split(".")[1] in parts]


def test_the_files_were_found() -> None:
    for module in (
        "quantc.errors",
        "quantc.numerics.packing",
        "quantc.passes.quantize",
        "quantc.kernels.cpu.torch_int4",
    ):
        assert module in FILES
    assert parts_imported("quantc.passes.quantize") >= {"errors", "numerics", "pipeline"}
    assert parts_imported("quantc.kernels.cpu.torch_int4") == {"formats", "spec"}
    assert "quantc.numerics.packing.pack_bits" in set(imports_of("quantc.formats.dense"))


def test_errors_import_nothing() -> None:
    assert list(imports_of("quantc.errors")) == []


@pytest.mark.parametrize("module", modules_under(*PURE))
def test_pure_parts_import_only_each_other(module: str) -> None:
    assert parts_imported(module) <= PURE
    assert not libraries_imported(module) & HEAVY


@pytest.mark.parametrize("module", modules_under("kernels"))
def test_kernels_import_only_what_describes_weights(module: str) -> None:
    assert parts_imported(module) <= {"errors", "spec", "qtensor", "formats", "numerics", "disk_cache"}
    assert "transformers" not in libraries_imported(module)


@pytest.mark.parametrize("module", modules_under("passes"))
def test_a_pass_imports_no_other_pass_and_nothing_above_it(module: str) -> None:
    assert not parts_imported(module) & {"kernels", "runtime", "hf", "cli", "api", "recipe", "export", "evaluation"}
    if module != "quantc.passes.__init__":
        others = {name for name in imports_of(module) if name.startswith("quantc.passes")}
        assert not others


BELOW_PIPELINE = (
    "graph",
    "frontend",
    "stats",
    "calibration",
    "checkpoint",
    "report",
    "blocks",
    "trace",
    "derive",
    "observe",
    "plan",
)


@pytest.mark.parametrize("module", modules_under(*BELOW_PIPELINE))
def test_what_the_pipeline_builds_on_does_not_know_it(module: str) -> None:
    above = {"pipeline", "work", "sweep", "passes", "kernels", "runtime", "hf", "api", "cli", "recipe", "export"}
    assert not parts_imported(module) & above


def test_the_pipeline_knows_no_pass_and_nothing_above() -> None:
    above = {"passes", "kernels", "runtime", "hf", "api", "cli", "recipe", "export"}
    for module in ("quantc.pipeline", "quantc.work", "quantc.sweep"):
        assert not parts_imported(module) & above


def test_runtime_and_hf_know_nothing_of_quantizing() -> None:
    quantizing = {"pipeline", "work", "sweep", "passes", "calibration", "frontend", "api", "cli", "recipe", "derive"}
    assert not parts_imported("quantc.runtime") & quantizing
    assert "numerics" not in parts_imported("quantc.runtime")
    assert parts_imported("quantc.hf") == {"runtime", "checkpoint", "model_check", "errors"}
    assert parts_imported("quantc.model_check") == {"checkpoint", "errors"}


@pytest.mark.parametrize("module", [*modules_under("cli", "__init__", "plugin", "errors", "command_group", "units")])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    assert not libraries_imported(module, everywhere=False) & {*HEAVY, "torch", "numpy", "scipy", "matplotlib"}


@pytest.mark.parametrize("module", modules_under(*MOUNTED))
def test_mounted_folders_import_upward_relatively(module: str) -> None:
    """An absolute import could load a second copy of the folder."""
    absolute = [
        node.module
        for node in ast.walk(parse(module))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "quantc"
    ]
    assert not absolute


def string_literals(module: str) -> Iterator[str]:
    """Every string but docstrings."""
    tree = parse(module)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize(
    "module",
    [name for name in FILES if name.split(".")[1] not in ("kernels", "calib_data") and name not in MAY_NAME_FAMILIES],
)
def test_no_model_family_is_called_by_its_name(module: str) -> None:
    for text in string_literals(module):
        for word in text.lower().replace("-", "_").replace(".", " ").replace("/", " ").split():
            assert not any(word == family or word.startswith((f"{family}_", f"{family}for")) for family in FAMILIES), (
                f"{module} names {text!r}; structure is derived, not looked up by name"
            )


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions and classes at module level without a docstring."""
    for child in tree.body:
        public = isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_")
        if public and ast.get_docstring(child) is None:
            yield child.name


@pytest.mark.parametrize("module", [name for name in FILES if FILES[name].name != "__init__.py"])
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(parse(module))


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = [f"{module}.{name}" for module in FILES for name in undocumented(parse(module))]
    assert missing == []
