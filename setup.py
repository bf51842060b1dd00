"""Packaging. `kernels/` installs as `crate_fast.kernels`: the import name `kernels` belongs to another project."""

from pathlib import Path

from setuptools import setup

TRAIN = [
    *("lion-pytorch", "matplotlib", "numpy", "opencv-python-headless", "pillow", "safetensors", "scikit-learn", "scipy"),
    *("simplejpeg", "torchvision>=0.26", "tqdm"),
]
HUB = ["huggingface-hub"]
TENSORBOARD = ["tensorboard"]
TEST = ["hypothesis", "ipykernel", "nbclient", "ninja", "pyright[nodejs]", "pytest", "pytest-benchmark", "pytest-xdist", "ruff"]

setup(
    name="crate-fast",
    version="0.1.0",
    description="CRATE, the white-box vision transformer, on fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["crate_fast", "crate_fast.inspection", "crate_fast.kernels", "crate_fast.training"],
    package_dir={"crate_fast.kernels": "kernels"},
    package_data={"crate_fast": ["py.typed"], "crate_fast.training": ["recipes/*.toml"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "einops", "tomli; python_version < '3.11'"],
    extras_require={"train": TRAIN, "hub": HUB, "tensorboard": TENSORBOARD, "test": TRAIN + HUB + TENSORBOARD + TEST},
    entry_points={"console_scripts": ["crate-fast = crate_fast.cli:main"]},
)
