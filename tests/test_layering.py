"""Who may import whom, read from the source; nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOUNTED = ("passes", "kernels", "calib_data")
FILES = {
    ".".join(["quantc", *path.relative_to(ROOT if top != "quantc" else ROOT / "quantc").with_suffix("").parts]): path
    for top in ("quantc", *MOUNTED)
    for path in sorted((ROOT / top).rglob("*.py"))
}
# A part is a module or a folder right under quantc. The list of floors is read from the page that shows it.
PAGE = ROOT / "docs" / "design.md"
HEAVY = {"transformers", "cupy", "safetensors", "accelerate", "datasets", "gguf"}
MOST_FILES_AT_THE_ROOT = 12
# GGUF files are told apart by their architecture, and demo models have names.
MAY_NAME_FAMILIES = {"quantc.frontend.gguf", "quantc.frontend.resolve"}
# GGUF names architectures, with a table for each, and kinds of tokenizers; llama.cpp's functions begin with llama.
GGUF = "quantc.export.gguf."
MAY_NAME_FAMILIES |= {"quantc.evaluation.llama_cpp", GGUF + "pre_tokenizers", GGUF + "tokenizer", GGUF + "mixes"}
MAY_NAME_FAMILIES |= {name for name in FILES if name.startswith(GGUF + "architectures.")}
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen", "gemma", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon",
    "stablelm", "olmo", "granite", "cohere", "starcoder", "deepseek", "mamba", "smollm", "glm", "nemotron",
)  # fmt: skip


def read_floors() -> list[list[str]]:
    """The parts of quantc, floor by floor, lowest first, from the code block below the page's heading."""
    block = PAGE.read_text().split("## Floors", 1)[1].split("```")[1]
    return [line.replace(",", " ").split() for line in block.splitlines()[1:] if line.strip()]


HEIGHT = {part: height for height, part in enumerate(part for floor in read_floors() for part in floor)}


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def package_of(module: str) -> list[str]:
    parts = module.split(".")
    return parts[:-1]


@cache
def imports_of(module: str, everywhere: bool = True) -> list[str]:
    """Full names of what a module imports: inside functions and for typing too, or only what its import runs."""
    found: list[str] = []
    for node in walk(parse(module), everywhere):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(module)[: -(node.level - 1) or None] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{name}.{alias.name}" for alias in node.names]
    return found


def walk(node: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    if everywhere:
        yield from ast.walk(node)
        return
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if typing_only or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
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


def modules_imported(module: str) -> set[str]:
    """The modules of quantc that a module imports, as `FILES` names them."""
    found = set()
    for name in imports_of(module):
        candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
        found |= {next((candidate for candidate in candidates if candidate in FILES), module)}
    return found - {module}


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
    assert "quantc.numerics.packing.pack_bits" in set(imports_of("quantc.formats.group_sparse"))
    assert modules_imported("quantc.formats.group_sparse") >= {"quantc.formats.base", "quantc.numerics.packing"}


def test_every_part_has_a_floor() -> None:
    assert set(HEIGHT) == {name.split(".")[1] for name in FILES} - {"__init__"}


@pytest.mark.parametrize("module", [name for name in FILES if name != "quantc.__init__"])
def test_a_part_imports_only_what_stands_before_it(module: str) -> None:
    own = module.split(".")[1]
    above = {part for part in parts_imported(module) if HEIGHT[part] > HEIGHT[own]}
    assert not above, f"{module} imports {above}, which docs/design.md lists after {own}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    imported = {module: modules_imported(module) for module in FILES if not module.endswith(".__init__")}
    while leaves := {module for module, needed in imported.items() if not needed & imported.keys()}:
        imported = {module: needed for module, needed in imported.items() if module not in leaves}
    assert not imported


def test_few_files_lie_at_the_root() -> None:
    files = [path for path in FILES.values() if path.parent == ROOT / "quantc"]
    assert len(files) <= MOST_FILES_AT_THE_ROOT


@pytest.mark.parametrize("module", modules_under("errors", "spec", "numerics", "formats"))
def test_pure_parts_import_no_heavy_library(module: str) -> None:
    assert not libraries_imported(module) & HEAVY


@pytest.mark.parametrize("module", modules_under("kernels"))
def test_kernels_import_only_what_describes_weights(module: str) -> None:
    assert parts_imported(module) <= {"errors", "spec", "formats", "numerics", "files"}
    assert "transformers" not in libraries_imported(module)


@pytest.mark.parametrize("module", modules_under("passes"))
def test_a_pass_imports_no_other_pass(module: str) -> None:
    if module != "quantc.passes.__init__":
        assert not {name for name in imports_of(module) if name.startswith("quantc.passes")}


@pytest.mark.parametrize("module", modules_under("runtime"))
def test_the_runtime_knows_nothing_of_quantizing(module: str) -> None:
    assert not parts_imported(module) & {"calibration", "plan", "pipeline"}
    if module in ("quantc.runtime.packed", "quantc.runtime.layers", "quantc.runtime.modules"):
        assert "numerics" not in parts_imported(module)
    assert parts_imported("quantc.runtime.hf") == {"checkpoint", "errors"}


@pytest.mark.parametrize(
    "module",
    [
        *modules_under("cli", "__init__", "errors", "units", "version"),
        "quantc.runtime.plugin",
        "quantc.runtime.__init__",
    ],
)
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
        for word in text.lower().replace("llama.cpp", "").replace("-", "_").replace(".", " ").replace("/", " ").split():
            assert not any(word == family or word.startswith((f"{family}_", f"{family}for")) for family in FAMILIES), (
                f"{module} names {text!r}; structure is derived, not looked up by name"
            )


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions and classes at module level without a docstring."""
    for child in tree.body:
        public = isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_")
        if public and ast.get_docstring(child) is None:
            yield child.name


@pytest.mark.parametrize("module", FILES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(parse(module))


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = [f"{module}.{name}" for module in FILES for name in undocumented(parse(module))]
    assert missing == []
