"""Packages: `quantc`, and three top-level folders mounted inside its namespace; start-up code; native CPU kernels.

`passes/`, `kernels/` and `calib_data/` stand at the top of the checkout but install as `quantc.passes`,
`quantc.kernels` and `quantc.calib_data`: their short names must not land in anybody's site-packages.

`quantc.kernels.cpu._native` is no Python module but a plain C library that ctypes loads. It is optional: where the
compiler fails, the package installs without.

`quantc-startup.pth` is quantc/runtime/startup.py in one line. Python runs it at its start, so that transformers loads
quantc checkpoints in processes that never import quantc.
"""

import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

MOUNTED = {"quantc.passes": "passes", "quantc.kernels": "kernels", "quantc.calib_data": "calib_data"}

STARTUP = Path("quantc/runtime/startup.py")

NATIVE = Path("kernels/cpu/native")
NATIVE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-g0", "-w"]
# Each instruction set is a file of its own, so that the library runs on every processor and chooses there.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
OWN_FLAGS = {
    "avx2": AVX2,
    "avx2_vnni": [*AVX2, "-mavxvnni"],
    "avx512vl_vnni": [*AVX512, "-mavx512vnni"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "avx512_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
NEW_FLAGS = {"avx2_vnni", "avx512_amx"}  # compiled to nothing where the compiler is too old for their flags
LIBRARIES = ["dl", "pthread"] if platform.system() == "Linux" else []
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")


class BuildNative(build_ext):
    """Compiles the native kernels, or warns that it could not."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler, an old one, one of another kind: each fails in its own way
            warnings.warn(f"quantc installs without its native CPU kernels: {error}", stacklevel=2)

    def build_extension(self, ext: Extension) -> None:
        def compile_one(source: str) -> list[str]:
            own = OWN_FLAGS.get(Path(source).stem, []) if IS_X86_64 else []
            try:
                return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=NATIVE_FLAGS + own)
            except CompileError:
                if Path(source).stem not in NEW_FLAGS:
                    raise
                return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=NATIVE_FLAGS)

        with ThreadPoolExecutor(2) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        file = Path(self.get_ext_fullpath(ext.name))
        file.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(file), libraries=LIBRARIES, build_temp=self.build_temp, target_lang="c++"
        )

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class BuildWithStartup(build_py):
    """Copies the packages, and writes the start-up code beside them."""

    def run(self) -> None:
        super().run()
        code = STARTUP.read_text(encoding="ascii")
        Path(self._startup_file()).write_text(f"import sys; exec({code!r}, {{}})\n", encoding="ascii")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), self._startup_file()]

    def _startup_file(self) -> str:
        # An editable wheel takes nothing from build_lib, but whatever is where `install` would install to.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        return str(Path(folder, "quantc-startup.pth"))


setup(
    packages=[
        *find_packages(include=["quantc", "quantc.*"]),
        *(
            package
            for name, folder in MOUNTED.items()
            for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
        ),
    ],
    package_dir=MOUNTED,
    package_data={
        "quantc": ["py.typed"],
        "quantc.kernels": ["cuda/*.cu", "cuda/include/*.cuh", "cpu/native/*.cpp", "cpu/native/*.h"],
        "quantc.calib_data": ["text/*.txt"],
    },
    ext_modules=[
        Extension(
            "quantc.kernels.cpu._native",
            sources=sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithStartup},
)
