"""Builds the native extension, and only that; everything else is in pyproject.toml.

``STEERKERN_BUILD``: ``auto`` (the CPU kernels where a C++ compiler works, else none: the package then runs on its plain
torch reference), ``cpu`` (the CPU kernels or an error), ``cuda`` (those and the CUDA kernels, or an error; needs nvcc
12 or newer, no GPU), ``none``. ``auto`` never builds CUDA, nvcc or not: that takes minutes instead of seconds.
``STEERKERN_CUDA_ARCHS=80,90``: compute capabilities to compile for, default ``80,90,100,120`` as far as nvcc knows
them; the last one is embedded as PTX too, for devices to come. ``STEERKERN_JOBS``: compilers of CUDA run at once.
``PYBIND11_INCLUDE``: pybind11's headers, where the package is not installed. ``STEERKERN_WERROR=1`` turns warnings into
errors. ``STEERKERN_SANITIZE=address,undefined`` builds for that sanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICES = ("auto", "none", "cpu", "cuda")
ARCHS = ("80", "90", "100", "120")
CUDA_SOURCE = "csrc/cuda/steer.cu"


def warnings() -> list[str]:
    """Flags that both compilers of C++ get."""
    return ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("STEERKERN_WERROR") == "1" else [])]


def pybind11_headers() -> str:
    """Those of the package, or of ``PYBIND11_INCLUDE`` (torch has a copy) on a machine without it."""
    if given := os.environ.get("PYBIND11_INCLUDE"):
        return given
    import pybind11

    return str(pybind11.get_include())


def extension(cuda: bool, optional: bool) -> Extension:
    """The extension; with ``optional``, a failed build is reported and left out."""
    flags = ["-std=c++17", "-O3", *warnings(), "-Wno-psabi", "-fvisibility=hidden", "-ffp-contract=off"]
    link = []
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
        link += ["-fopenmp", "-Wl,-s"]
    if sanitize := os.environ.get("STEERKERN_SANITIZE"):
        flags += ["-g", "-O1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"]
        link = ["-fopenmp", f"-fsanitize={sanitize}"]
    folders = ["cpu", "cuda"] if cuda else ["cpu"]
    return Extension(
        "steerkern._C",
        sources=["csrc/bindings.cpp", *(str(p) for f in folders for p in sorted(Path("csrc", f).glob("*.cpp")))],
        depends=[str(p) for pattern in ("*.h", "*.cu") for p in sorted(Path("csrc").rglob(pattern))],
        define_macros=[("STEERKERN_CUDA", "1")] if cuda else [],
        include_dirs=[pybind11_headers()],
        language="c++",
        extra_compile_args=flags,
        extra_link_args=link,
        optional=optional,
    )


def find_nvcc() -> str:
    """nvcc of ``CUDACXX``, ``CUDA_HOME``, the path or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    found = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in found:
        if nvcc and Path(nvcc).exists():
            return nvcc
    raise SystemExit("STEERKERN_BUILD=cuda: no nvcc in CUDACXX, CUDA_HOME, on the path or in /usr/local/cuda")


def run(*command: str) -> str:
    """Output of a command; its errors go to the terminal."""
    print(" ".join(command), flush=True)
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def choose_archs(nvcc: str) -> list[str]:
    """``STEERKERN_CUDA_ARCHS``, or those of the default that this nvcc knows."""
    known = {line.removeprefix("compute_") for line in run(nvcc, "--list-gpu-arch").split()}
    if wanted := os.environ.get("STEERKERN_CUDA_ARCHS"):
        archs = wanted.replace(",", " ").split()
        if odd := [arch for arch in archs if not re.fullmatch(r"\d+[af]?", arch) or int(arch.rstrip("af")) < 80]:
            raise SystemExit(f"STEERKERN_CUDA_ARCHS={wanted!r}: {odd[0]} is no compute capability from 80 on")
        return archs
    return [arch for arch in ARCHS if arch in known]


def library_folders(nvcc: str) -> list[str]:
    """Where nvcc itself looks for libcudart_static.a; its own path may be that of a wrapper."""
    steps = subprocess.run([nvcc, "-dryrun", "-c", CUDA_SOURCE], text=True, capture_output=True, check=True).stderr
    folders = re.findall(r'"-L(.+?)"', " ".join(line for line in steps.splitlines() if "LIBRARIES=" in line))
    return [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]


class Build(build_ext):
    """``build_ext`` that compiles the kernels with nvcc first and links them in with a static cudart."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        if ("STEERKERN_CUDA", "1") in ext.define_macros:
            self._add_kernels(ext)
        super().build_extension(ext)

    def _add_kernels(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        archs = choose_archs(nvcc)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        target = Path(self.build_temp, "steer_cu.o")
        jobs = os.environ.get("STEERKERN_JOBS") or str(min(len(archs), os.cpu_count() or 1))
        # one call for all archs: the host half must be that of the fat binary
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        command = [nvcc, "-c", CUDA_SOURCE, "-o", str(target), "-std=c++17", "-O3", "-fmad=false", *codes, "-t", jobs]
        command += ["-Xcompiler", ",".join([*warnings(), "-fPIC", "-fvisibility=hidden"]), "-cudart", "static"]
        command.append(f'-DSTEER_ARCHS="{", ".join(archs)} and PTX of {archs[-1]}"')
        if "--compress-mode" in run(nvcc, "--help"):
            command.append("--compress-mode=size")
        if os.environ.get("STEERKERN_WERROR") == "1":
            command += ["-Werror", "all-warnings"]
        run(*command)
        ext.extra_objects = [str(target)]
        ext.library_dirs += library_folders(nvcc)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


choice = os.environ.get("STEERKERN_BUILD", "auto")
if choice not in CHOICES:
    raise SystemExit(f'STEERKERN_BUILD="{choice}": choose one of {", ".join(CHOICES)}')

setup(
    ext_modules=[] if choice == "none" else [extension(cuda=choice == "cuda", optional=choice == "auto")],
    cmdclass={"build_ext": Build},
)
