"""Maps the folders of this tree into the one import name `slimgemm`."""

from setuptools import setup

PACKAGES = ("kernels", "kernels/gluon", "sparse_ops", "pruning", "benchmarks")

setup(
    packages=["slimgemm." + folder.replace("/", ".") for folder in PACKAGES],
    package_dir={"slimgemm." + folder.replace("/", "."): folder for folder in PACKAGES},
    package_data={"slimgemm." + folder.replace("/", "."): ["py.typed", "*.md", "*.csv", "*.json"] for folder in PACKAGES},
)
