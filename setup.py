"""Builds the native extension, and only that; everything else is in pyproject.toml.

``STEERKERN_BUILD``: ``auto`` (the CPU kernels where a C++ compiler works, else none: the package then runs on its plain
torch reference), ``cpu`` (the CPU kernels or an error), ``none``. ``STEERKERN_WERROR=1`` turns warnings into errors.
``STEERKERN_SANITIZE=address,undefined`` builds for that sanitizer.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CHOICES = ("auto", "none", "cpu", "cuda")


def cpu_extension(optional: bool) -> Pybind11Extension:
    """The extension with the CPU kernels; with ``optional``, a failed build is reported and left out."""
    flags = ["-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden", "-ffp-contract=off"]
    link = []
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
        link += ["-fopenmp", "-Wl,-s"]
    if os.environ.get("STEERKERN_WERROR") == "1":
        flags.append("-Werror")
    if sanitize := os.environ.get("STEERKERN_SANITIZE"):
        flags += ["-g", "-O1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"]
        link = ["-fopenmp", f"-fsanitize={sanitize}"]
    return Pybind11Extension(
        "steerkern._C",
        sources=["csrc/bindings.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
        depends=[str(header) for header in sorted(Path("csrc").rglob("*.h"))],
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=link,
        optional=optional,
    )


choice = os.environ.get("STEERKERN_BUILD", "auto")
if choice not in CHOICES:
    raise SystemExit(f'STEERKERN_BUILD="{choice}": choose one of {", ".join(CHOICES)}')
if choice == "cuda":
    raise SystemExit("STEERKERN_BUILD=cuda: this version has no CUDA kernels yet; choose cpu or auto")

setup(
    ext_modules=[] if choice == "none" else [cpu_extension(optional=choice == "auto")],
    cmdclass={"build_ext": build_ext},
)
