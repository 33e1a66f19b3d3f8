"""Package metadata: ranges for users, and the versions that the tests run on in the extra "test"."""

from setuptools import find_packages, setup

setup(
    name="ds_recsys",
    version="0.1.0",
    description="Fine-tune Hugging Face LLMs as recommenders with DeepSpeed, on any grid of devices.",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["ds_recsys", "ds_recsys.*"]),
    package_data={"ds_recsys.comm.kernels": ["*.c", "*.h"]},
    install_requires=[
        "torch>=2.9,<3",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "datasets>=5.2,<6",
        "accelerate>=1.15,<2",
        "safetensors>=0.5",
        "gguf>=0.17",
        "pydantic>=2.10,<3",
        "numpy>=1.26",
        "scipy>=1.11",
        "pyarrow>=17",
        "filelock>=3.12",
        "pyyaml>=6",
        "tqdm>=4.66",
        "xxhash>=3",
        "matplotlib>=3.8",
        "setuptools",  # DeepSpeed's op builders import it
    ],
    extras_require={
        "test": [
            "deepspeed==0.19.8",
            "transformers==5.23.0",
            "datasets==5.2.0",
            "accelerate==1.15.0",
            "pytest>=8",
            "hypothesis>=6",
            "torchmetrics>=1.4",
        ]
    },
)
