import re

from setuptools import find_packages, setup


# The lower bounds are the versions in constraints-floors.txt, with which `make test-floors` runs some tests. Older
# versions of torch can work; 2.13 is the oldest tested version.
SAMPLING = [  # packages in a Space of the demo
    "diffusers>=0.42",
    "huggingface-hub>=1.32",
    "numpy>=2.0",
    "pillow>=10.1",
    "safetensors>=0.8",
    "torch>=2.13",
]
TRAINING = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "filelock>=3.12",
    "jinja2>=3.1",
    "markupsafe>=2.1.1",
    "matplotlib>=3.9",
    "psutil>=5.9.5",
    "pyarrow>=17.0",
    "pyyaml>=6.0.1",
    "scikit-learn>=1.5",
    "tqdm>=4.66.3",
    "transformers>=5.0",
]
DEMO = ["gradio>=6.0"]
LORA = ["peft>=0.17"]
EXPORT = ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"]
ORACLES = ["prdc>=0.2", "torchmetrics>=1.9"]
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10"]
TEST = [
    "pytest>=8.0",
    "pytest-timeout>=2.2",
    "pytest-xdist>=3.5",
    "setuptools>=77",
    "tensorboard>=2.15",
    *ORACLES,
    *NOTEBOOK,
]
QUALITY = ["mypy==2.4.1", "ruff==0.17.5"]

# subpackages and their folders in the source tree
BESIDE = {"hub_cards": "hub_cards", "pipelines": "pipelines", "scripts": "training"}


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


setup(
    name="cm-diffusers",
    version=re.search('^__version__ = "(.+)"$', read("cm_diffusers/__init__.py"), re.MULTILINE)[1],
    description="Consistency models and their relatives for diffusers: generators that sample in one to four steps",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="consistency models, diffusion, distillation, few-step generation, diffusers",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cm_diffusers*"]), *(f"cm_diffusers.{name}" for name in BESIDE)],
    package_dir={f"cm_diffusers.{name}": folder for name, folder in BESIDE.items()},
    package_data={
        "cm_diffusers": ["py.typed"],
        "cm_diffusers.hub_cards": ["model_card.md", "text_card.md", "report.html", "page/*", "space/*"],
        "cm_diffusers.scripts": ["configs/*.yaml", "accelerate/*.yaml", "help/*.txt"],
    },
    entry_points={"console_scripts": ["cm-diffusers = cm_diffusers.cli:main"]},
    install_requires=SAMPLING + TRAINING + EXPORT,
    extras_require={
        "demo": DEMO,
        "lora": LORA,
        "lpips": ["lpips>=0.1.4"],  # requires torchvision
        "nf4": ["bitsandbytes>=0.50"],
        "test": DEMO + LORA + TEST,
        "dev": DEMO + LORA + TEST + QUALITY,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
