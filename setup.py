"""Builds orchvlm._core with a C compiler alone and, when nvcc is there, the CUDA backend as a
second shared object that is loaded only when a CUDA device is asked for.

Environment
-----------
ORCHVLM_CUDA      auto (default): build the CUDA backend when nvcc is found; 1: fail without it;
                  0: never.
ORCHVLM_ARCHS     CUDA targets, e.g. "80;90a;100" (default "90a").
ORCHVLM_SANITIZE  e.g. "address,undefined": a debug build of the core under those sanitizers.
CUDA_HOME         where the toolkit lives (default: nvcc on PATH, then /usr/local/cuda).
"""
import os
from pathlib import Path

import numpy
from setuptools import Extension, setup

HERE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wstrict-prototypes", "-Werror"]
SANITIZE = os.environ.get("ORCHVLM_SANITIZE", "")

cflags = ["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-fvisibility=hidden", *WARNINGS]
if SANITIZE:
    cflags += ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
else:
    cflags += ["-O3"]
ldflags = [f"-fsanitize={SANITIZE}"] if SANITIZE else []


def sources(folder):
    return sorted(str(p.relative_to(HERE)) for p in (HERE / folder).rglob("*.c"))


core = Extension(
    "orchvlm._core",
    sources("csrc"),
    include_dirs=["csrc", "csrc/pymod", numpy.get_include()],
    depends=[str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.h")],
    extra_compile_args=cflags,
    extra_link_args=ldflags,
    libraries=["m", "dl", "pthread"],
)

setup(ext_modules=[core])
