"""Installs vidsim, and the folder third_party/ as the package vidsim.third_party."""

import setuptools

# Lower bounds are the versions the tests ran with (third_party/constraints-*.txt); no upper bounds.
REQUIRED = [
    "absl-py>=2.5.1",
    "array-record>=0.8.6",
    "av>=18.1.0",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "matplotlib>=3.11.2",
    "ml-collections>=1.1.0",
    "numpy>=2.4.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0.0",
    "safetensors>=0.8.0",
    "scipy>=1.17.1",
    "sentencepiece>=0.2.3",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.70.1",
]

EXTRAS = {
    "test": ["hypothesis>=6.170.15", "pytest>=9.2.0", "pytest-xdist>=3.8.0", "ruff>=0.17.6"],
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "prepare": ["importlib-resources>=7.1.0", "ray>=2.60.0", "scenedetect>=0.7.2"],
    "quantised": ["qwix>=0.1.8"],
    "worlds": ["craftax", "mujoco", "vizdoom"],
    "parity": ["diffusers", "torch", "transformers"],
}

setuptools.setup(
    name="vidsim",
    version="0.1.0",
    description="Pretraining of video world simulators in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *setuptools.find_packages(include=["vidsim", "vidsim.*"]),
        "vidsim.third_party",
        *(f"vidsim.third_party.{name}" for name in setuptools.find_packages("third_party")),
    ],
    package_dir={"vidsim": "vidsim", "vidsim.third_party": "third_party"},
    package_data={
        "vidsim.third_party": ["*.toml", "*.txt"],
        "vidsim.third_party.lpips": ["METADATA"],
        "vidsim.third_party.wan_vae": ["METADATA"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vidsim = vidsim.cli.main:main"]},
)
