"""The package map; metadata and tool settings are in pyproject.toml.

`kernels/` and `bench/` stand at the top of the repository and are installed as `tritorch.kernels`
and `tritorch.bench`. In a checkout two symbolic links show them at the same place; the map does not
rely on the links.
"""

from setuptools import find_packages, setup

MAPPED = {"tritorch.kernels": "kernels", "tritorch.bench": "bench"}

setup(
    # a set: where the links are followed, find_packages sees bench/ as well
    packages=sorted({*find_packages(include=["tritorch", "tritorch.*"]), *MAPPED}),
    package_dir=MAPPED,
    py_modules=["pytest_tritorch"],
    package_data={
        "tritorch": ["py.typed"],
        "tritorch.data": ["README.md", "digits.npz", "tuned/*.json"],
        "tritorch.kernels": ["README.md"],
        "tritorch.bench": ["README.md"],
    },
    # only what is listed above: the sdist holds results that nobody needs installed
    include_package_data=False,
)
