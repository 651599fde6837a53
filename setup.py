"""Builds orchvlm._core with a C compiler alone and, when nvcc is there, the CUDA backend as a
second shared object that is loaded only when a CUDA device is asked for.

Environment
-----------
ORCHVLM_CUDA      auto (default): build the CUDA backend when nvcc is found, and go on without it
                  when that fails; 1: it must be built; 0: never.
ORCHVLM_ARCHS     CUDA targets, e.g. "80;90a;100" (default "90a").
ORCHVLM_SANITIZE  e.g. "address,undefined": a debug build of the core under those sanitizers.
CFLAGS            added to the compiler's; an -O in it replaces our -O3.
CUDA_HOME         where the toolkit lives (default: nvcc on PATH, then /usr/local/cuda).
"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wstrict-prototypes", "-Werror"]
SANITIZE = os.environ.get("ORCHVLM_SANITIZE", "")

# No fused multiply-add unless the code says so: a plan must be the same on every machine, and a row
# of a tensor the same wherever a compiler unrolls a loop.  csrc/cpu reads neither errno nor traps.
TENSOR_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
cflags = ["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-fvisibility=hidden", "-ffp-contract=off",
          *WARNINGS]
optimize = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # as everywhere: CFLAGS wins
if SANITIZE:
    optimize = ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
ldflags = [f"-fsanitize={SANITIZE}"] if SANITIZE else []


def files(folder, *suffixes):
    found = (p for p in (HERE / folder).rglob("*") if p.suffix in suffixes)
    return sorted(str(p.relative_to(HERE)) for p in found)


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home, "bin", "nvcc") for home in homes if home]
    places += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(p) for p in places if p and os.access(p, os.X_OK)), None)


def cuda_wanted():
    """nvcc's path, or None when the CUDA backend is not to be built."""
    choice = os.environ.get("ORCHVLM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ORCHVLM_CUDA must be auto, 0 or 1; got {choice!r}")
    nvcc = None if choice == "0" else find_nvcc()
    if nvcc is None and choice == "1":
        sys.exit("ORCHVLM_CUDA=1, but nvcc was not found on PATH, in CUDA_HOME or in "
                 "/usr/local/cuda; install the CUDA toolkit, or leave ORCHVLM_CUDA out")
    if nvcc is None and choice == "auto":
        print("orchvlm: nvcc was not found, so the CUDA backend is not built (CPU only)",
              flush=True)
    return nvcc


def run_tool(command, verbose):
    command = [str(word) for word in command]
    if verbose:
        print(" ".join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise CompileError("failed: " + " ".join(command))


class CudaLibrary(Extension):
    """A plain shared object: no PyInit, no ABI tag in its name, loaded with dlopen."""

    def __init__(self, name, sources, nvcc, **options):
        super().__init__(name, sources, **options)
        self.nvcc = nvcc


class BuildExt(build_ext):
    """Compiles a library's objects side by side, and CUDA libraries with nvcc."""

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] == "_cuda":
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext):
        return [] if isinstance(ext, CudaLibrary) else super().get_export_symbols(ext)

    def build_extensions(self):
        # distutils compiles one file after the other; each call below is a compiler of its own.
        compile_serially = self.compiler.compile

        def compile_side_by_side(sources, **options):
            def compile_one(source):
                mine = dict(options)
                if Path(source).parent == Path("csrc", "cpu"):
                    mine["extra_postargs"] = [*(mine.get("extra_postargs") or []), *TENSOR_FLAGS]
                return compile_serially([source], **mine)

            with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
                done = pool.map(compile_one, sources)
                return [obj for objects in done for obj in objects]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()

    def build_extension(self, ext):
        if isinstance(ext, CudaLibrary):
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        temp = Path(self.build_temp, "cuda")
        inputs = [HERE / path for path in (*ext.sources, *ext.depends, "setup.py")]
        if not self.force and target.exists() and all(
                path.stat().st_mtime < target.stat().st_mtime for path in inputs):
            return
        for folder in (target.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        gencode = []
        for arch in os.environ.get("ORCHVLM_ARCHS", "90a").replace(",", ";").split(";"):
            gencode += ["-gencode", f"arch=compute_{arch.strip()},code=sm_{arch.strip()}"]

        def compile_one(source):
            obj = temp / (Path(source).name + ".o")
            host = ["-fPIC", "-fvisibility=hidden", *WARNINGS[:2], "-Werror"]
            if source.endswith(".c"):
                host = ["-fPIC", *cflags]
            run_tool([ext.nvcc, "-c", HERE / source, "-o", obj, "-O3", *gencode,
                      *(f"-I{HERE / folder}" for folder in ext.include_dirs),
                      "-Xcompiler", ",".join(host)], self.verbose)
            return obj

        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        run_tool([ext.nvcc, "-shared", "-o", target, *objects, *gencode, "-cudart", "static",
                  "-Xlinker", f"--version-script={HERE / 'cuda' / 'exports.map'}",
                  "-Xlinker", "-z,defs"], self.verbose)


core = Extension(
    "orchvlm._core",
    files("csrc", ".c"),
    include_dirs=["csrc", "csrc/pymod", numpy.get_include()],
    depends=files("csrc", ".h"),
    extra_compile_args=[*cflags, *optimize],
    extra_link_args=ldflags,
    libraries=["m", "dl", "pthread"],
)
modules = [core]
if (nvcc := cuda_wanted()) is not None:
    # Its own copy of status.c: the two libraries share tables and structs, never symbols.
    modules.append(CudaLibrary("orchvlm._cuda", [*files("cuda", ".c", ".cu"),
                                                 "csrc/base/status.c"], nvcc,
                               include_dirs=["csrc", "cuda"],
                               # A broken toolkit must not cost a user the planner.
                               optional=os.environ.get("ORCHVLM_CUDA", "auto") == "auto",
                               depends=[*files("csrc", ".h"), "cuda/exports.map"]))

setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})
