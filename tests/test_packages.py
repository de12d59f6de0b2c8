"""The sdist and the wheel install in a clean environment, with a compiler and without one, and quantize a model there.

`QUANTC_DIST=dist` takes what `make dist` has built, which saves minutes of compiling.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "tiny_model" / "model"
NO_COMPILER = {name: "/nonexistent/compiler" for name in ("CC", "CXX", "LDSHARED")}
NEWEST_GLIBC = 36  # minor version of Debian 12's, the oldest system that `make dist` is meant for
CHECK = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("packed")
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
import quantc
from quantc.calib_data import load_documents
from quantc.kernels.cpu import library
assert quantc.__file__.startswith(sys.prefix), quantc.__file__
model = quantc.load("packed", verify=True)
assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
print("no native kernels" if isinstance(library.load(), str) else "native kernels")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    if "QUANTC_DIST" in os.environ:
        return Path(os.environ["QUANTC_DIST"]).resolve()
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], folder)
    return folder


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command outside the checkout and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**environment, **variables}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clean_environment(folder: Path) -> Path:
    """Make a virtual environment that sees this one's packages, but not the editable quantc; return its bin folder.

    A path in a .pth file is added as it is: the .pth file of the editable install in that path is not read.
    """
    run([sys.executable, "-m", "venv", str(folder)], folder.parent)
    site = run([str(folder / "bin" / "python"), "-c", "import site; print(site.getsitepackages()[0])"], folder).strip()
    (Path(site) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.parametrize("compiler", [True, False], ids=["with a compiler", "without one"])
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_quantizes(kind: str, compiler: bool, dist: Path, tmp_path: Path) -> None:
    (package,) = dist.glob(kind)
    variables = {"OMP_NUM_THREADS": "1"} | ({} if compiler else NO_COMPILER)
    bin_folder = clean_environment(tmp_path / "clean")
    run([str(bin_folder / "python"), "-m", "pip", "install", "--no-deps", str(package)], tmp_path, **variables)
    quantc = str(bin_folder / "quantc")
    assert run([quantc, "--version"], tmp_path, **variables).startswith("quantc 0.")
    assert "cpu kernels" in run([quantc, "doctor"], tmp_path, **variables).lower()
    small = ["--bits", "4", "--group-size", "32", "--samples", "2", "--seq-len", "64", "--out", "packed", "--quiet"]
    run([quantc, "quantize", str(MODEL), *small], tmp_path, **variables)
    kernels = "native kernels" if compiler or kind == "*.whl" else "no native kernels"
    assert run([str(bin_folder / "python"), "-c", CHECK], tmp_path, **variables).strip() == kernels


def test_an_editable_install_needs_no_import_either(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "tests", "docs", "benchmarks", "build", "dist", "*.so")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)
    python = str(clean_environment(tmp_path / "clean") / "python")
    run([python, "-m", "pip", "install", "--no-deps", "-e", str(checkout)], tmp_path, **NO_COMPILER)
    shown = "import sys, transformers.quantizers.auto as table; print('quantc' in table.AUTO_QUANTIZER_MAPPING)"
    assert run([python, "-c", shown], tmp_path).strip() == "True"
    run([python, "-m", "pip", "uninstall", "-y", "quantc"], tmp_path)
    assert run([python, "-c", shown], tmp_path).strip() == "False"


def test_the_wheel_has_its_data_and_a_manylinux_tag(dist: Path) -> None:
    pytest.importorskip("auditwheel")
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("kernels", "**/*.cu*"), ("kernels", "**/*.h"), ("calib_data", "text/*.txt")):
        files = {f"quantc/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).glob(pattern)}
        assert files
        assert files <= names
    shown = run([sys.executable, "-m", "auditwheel", "show", str(wheel)], dist)
    (minor,) = re.findall(r'following platform tag: "manylinux_2_(\d+)_x86_64"', " ".join(shown.split()))
    assert int(minor) <= NEWEST_GLIBC
