"""Packages: `quantc`, and three top-level folders mounted inside its namespace.

`passes/`, `kernels/` and `calib_data/` stand at the top of the checkout but install as `quantc.passes`,
`quantc.kernels` and `quantc.calib_data`: their short names must not land in anybody's site-packages.
"""

from setuptools import find_packages, setup

MOUNTED = {"quantc.passes": "passes", "quantc.kernels": "kernels", "quantc.calib_data": "calib_data"}

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
        "quantc.kernels": ["cuda/*.cu", "cuda/include/*.cuh"],
        "quantc.calib_data": ["text/*.txt"],
    },
)
