"""Builds the native libraries; everything else is in pyproject.toml.

    csrc/cpu   -> swkernels/_native/libswkernels_cpu    with any C++17 compiler
    csrc/cuda  -> swkernels/_native/libswkernels_cuda   with nvcc

Neither needs PyTorch, and neither must be there: without a compiler the package installs all the
same, and what was built, how, or why not stands in swkernels/_native/build.json.

    SWKERNELS_BUILD_CPU, SWKERNELS_BUILD_CUDA   0: do not build; 1: build or fail the install;
                                                unset: build where it can be done
    CXX, CXXFLAGS, LDFLAGS                      the C++ compiler and more flags for it
    CUDACXX, CUDA_HOME                          nvcc, or where CUDA lies
    SWKERNELS_CUDA_ARCHS                        "sm_80;sm_90" ...; PTX of the last is added
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
NATIVE = Path("swkernels", "_native")
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARIES = ("cpu", "cuda")

CUDA_ARCHS = ("sm_80", "sm_90", "sm_100")
# Vector code needs to know that nobody looks at errno or at floating-point exceptions.
CXX_FLAGS = (
    "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -fPIC -shared -fvisibility=hidden -pthread"
)


class NotBuilt(Exception):
    """A library that is not built, and why."""


def sources(name: str) -> list[str]:
    """The files to compile for a library, relative to the root."""
    pattern = {"cpu": "cpu/*.cpp", "cuda": "cuda/*.cu"}[name]
    files = [*sorted((ROOT / "csrc").glob(pattern)), ROOT / "csrc" / "status.cpp"]
    return [str(path.relative_to(ROOT)) for path in files]


def source_digest() -> str:
    """A digest of csrc, by which a library that is older than its source can be told."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cpu_command(output: Path) -> list[str]:
    """The command that builds the CPU library."""
    compiler = _cxx()
    files = sources("cpu")
    if Path(compiler[0]).stem.lower() == "cl":
        return [*compiler, "/nologo", "/std:c++17", "/O2", "/EHsc", "/LD", *files, f"/Fe:{output}"]
    extra = [shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS")]
    return [*compiler, *CXX_FLAGS.split(), *extra[0], *files, "-o", str(output), *extra[1]]


def cuda_command(output: Path) -> list[str]:
    """The command that builds the CUDA library."""
    nvcc = _nvcc()
    archs = _cuda_archs(nvcc)
    host = [] if sys.platform == "win32" else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    targets = [f"-gencode=arch={_virtual(arch)},code={arch}" for arch in archs]
    targets.append(f"-gencode=arch={_virtual(archs[-1])},code={_virtual(archs[-1])}")
    return [
        *(nvcc, "-std=c++17", "-O3", "-shared", *host),
        *(*targets, *sources("cuda"), "-o", str(output)),
    ]


def _virtual(arch: str) -> str:
    return arch.replace("sm_", "compute_")


def _cxx() -> list[str]:
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise NotBuilt(f"CXX={os.environ['CXX']} is not there")
        return command
    for name in ("c++", "g++", "clang++", "cl"):
        if shutil.which(name):
            return [name]
    raise NotBuilt("no C++ compiler was found (c++, g++, clang++ or cl on PATH, or CXX)")


def _nvcc() -> str:
    if os.environ.get("CUDACXX"):
        if shutil.which(os.environ["CUDACXX"]) is None:
            raise NotBuilt(f"CUDACXX={os.environ['CUDACXX']} is not there")
        return os.environ["CUDACXX"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if not found:
        raise NotBuilt("no nvcc was found (on PATH, in CUDA_HOME, or CUDACXX)")
    return found


def _cuda_archs(nvcc: str) -> list[str]:
    wanted = os.environ.get("SWKERNELS_CUDA_ARCHS")
    if wanted:
        return wanted.replace(",", ";").replace(" ", "").strip(";").split(";")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = listed.stdout.split()
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise NotBuilt(f"{nvcc} knows none of {', '.join(CUDA_ARCHS)}")
    return archs


def build_library(name: str, directory: Path) -> dict:
    """Build one library into ``directory``; return its entry of build.json."""
    switch = os.environ.get(f"SWKERNELS_BUILD_{name.upper()}", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"SWKERNELS_BUILD_{name.upper()} must be 0 or 1, got {switch!r}")
    output = (directory / f"libswkernels_{name}{SUFFIX}").resolve()
    output.unlink(missing_ok=True)
    entry = {"built": False, "reason": None, "compiler": None, "command": None, "seconds": None}
    try:
        if switch == "0":
            raise NotBuilt(f"SWKERNELS_BUILD_{name.upper()}=0")
        command = {"cpu": cpu_command, "cuda": cuda_command}[name](output)
        entry["command"] = shlex.join(command).replace(str(output), output.name)
        entry["compiler"] = _compiler_version(command[0])
        started = time.perf_counter()
        _compile(command, output)
        entry["seconds"] = round(time.perf_counter() - started, 1)
        entry["built"] = True
    except NotBuilt as error:
        entry["reason"] = str(error)
        if switch == "1":
            raise SystemExit(f"SWKERNELS_BUILD_{name.upper()}=1, but: {error}") from error
    return entry


def _compile(command: list[str], output: Path) -> None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(f"{command[0]} does not run: {error}") from error
    if result.returncode != 0 or not output.exists():
        output.unlink(missing_ok=True)
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise NotBuilt(f"{command[0]} failed: " + "; ".join(errors[:3])[:500])


def _compiler_version(compiler: str) -> str:
    try:
        result = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=False
        )
    except OSError:
        return compiler
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc's first line says nothing
    return (release or lines or [compiler])[0].strip()


class build_native(Command):
    """Build the native libraries: a step of ``build``, or by itself with ``--inplace``."""

    description = "build the native libraries"
    user_options = [("inplace", "i", "put them into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        directory = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / NATIVE
        directory.mkdir(parents=True, exist_ok=True)
        record = {name: build_library(name, directory) for name in LIBRARIES}
        record["sources"] = source_digest()
        record["platform"] = platform.platform()
        text = json.dumps(record, indent=2) + "\n"
        (directory / "build.json").write_text(text, encoding="utf-8")
        for name in LIBRARIES:
            self._tell(name, record[name])

    def _tell(self, name: str, entry: dict) -> None:
        if entry["built"]:
            self.announce(f"built libswkernels_{name} in {entry['seconds']} s", level=logging.INFO)
        elif entry["command"]:
            self.warn(
                f"libswkernels_{name} could not be built, swkernels installs without it and uses "
                f"its other backends. {entry['reason']}"
            )
        else:
            self.announce(
                f"libswkernels_{name} is not built: {entry['reason']}", level=logging.INFO
            )

    def built(self) -> list[Path]:
        """The libraries that stand in the build directory."""
        directory = Path(self.build_lib) / NATIVE
        return sorted(directory.glob(f"libswkernels_*{SUFFIX}"))

    # The protocol of setuptools' SubCommand, which editable installs use.

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in [*self.built(), Path(self.build_lib) / NATIVE / "build.json"]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class build_with_native(build):
    """``build`` with the native step last, so that it writes beside the copied Python files."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class wheel(bdist_wheel):
    """A wheel for any Python 3: of this platform where it carries a library, else of any."""

    def run(self) -> None:
        self.run_command("build")
        native = bool(self.get_finalized_command("build_native").built())
        self.root_is_pure = not native
        self.distribution.has_ext_modules = lambda: native
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return ("py3", "none", "any")
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        cmdclass={
            "build": build_with_native,
            "build_native": build_native,
            "bdist_wheel": wheel,
        }
    )
