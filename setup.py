"""Maps the folders of this tree into the one import name `slimgemm`."""

from setuptools import setup

FOLDERS = {
    "slimgemm.kernels": "kernels",
    "slimgemm.kernels.gluon": "kernels/gluon",
    "slimgemm.sparse_ops": "sparse_ops",
    "slimgemm.pruning": "pruning",
    "slimgemm.benchmarks": "benchmarks",
}

setup(
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        name: ["py.typed", "*.md", "*.csv", "*.json", "tables/*.json"] for name in FOLDERS
    },
)
