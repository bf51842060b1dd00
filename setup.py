"""The packages; all else is in pyproject.toml. `kernels/` installs as `crate_fast.kernels`: `kernels` is another project."""

from setuptools import find_packages, setup

# In a checkout crate_fast/kernels is a link to kernels/, in a source archive it is not there: it is named, and found once.
OWN = find_packages(include=["crate_fast", "crate_fast.*"], exclude=["crate_fast.kernels", "crate_fast.kernels.*"])

setup(packages=[*OWN, "crate_fast.kernels", "crate_fast.training.recipes"], package_dir={"crate_fast.kernels": "kernels"})
