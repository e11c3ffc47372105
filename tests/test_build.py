"""What ``pip install`` makes: with a compiler, without one, with one that fails, switched off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
CPU, CUDA = f"libswkernels_cpu{SUFFIX}", f"libswkernels_cuda{SUFFIX}"

needs_cxx = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is installed"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture
def project(tmp_path):
    """A copy of the project without anything that was built in it."""
    copy = tmp_path / "project"
    built = shutil.ignore_patterns("__pycache__", "libswkernels_*", "build.json", "*.egg-info")
    for name in ("csrc", "swkernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


def setup(project, *arguments, **environment):
    """Run setup.py as pip's build backend does, with only these build variables set."""
    ours = ("SWKERNELS_", "CXX", "LDFLAGS", "CUDA")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=project, env=clean | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def build_wheel(project, **environment):
    """Build a wheel; return its tag, the names in swkernels/_native, build.json and the output."""
    result = setup(project, "bdist_wheel", **environment)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (path,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        record = json.loads(wheel.read("swkernels/_native/build.json"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        pure = "Root-Is-Purelib: true" in wheel.read(metadata).decode()
    assert "swkernels/__init__.py" in names
    assert not [name for name in names if ".data/" in name]
    tag = path.stem.split("-", 2)[2]
    assert pure == (tag == "py3-none-any")
    native = {Path(name).name for name in names if name.startswith("swkernels/_native/")}
    return tag, native, record, output


def failing_compiler(tmp_path):
    script = tmp_path / "broken-c++"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing as C++17' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def test_switched_off(project):
    stale = project / "swkernels" / "_native"
    stale.mkdir(exist_ok=True)
    for name in (CPU, CUDA):
        (stale / name).write_bytes(b"left from an earlier build in the source tree")
    tag, native, record, _ = build_wheel(project, SWKERNELS_BUILD_CPU="0", SWKERNELS_BUILD_CUDA="0")
    assert tag == "py3-none-any"
    assert native == {"build.json"}
    assert record["cpu"]["reason"] == "SWKERNELS_BUILD_CPU=0"
    assert record["cuda"]["reason"] == "SWKERNELS_BUILD_CUDA=0"
    assert not record["cpu"]["built"] and not record["cuda"]["built"]


def test_a_compiler_that_does_not_exist(project):
    missing = "/nowhere/c++"
    tag, native, record, _ = build_wheel(project, CXX=missing, CUDACXX=missing)
    assert tag == "py3-none-any"
    assert native == {"build.json"}
    assert record["cpu"]["reason"] == f"CXX={missing} is not there"
    assert record["cuda"]["reason"] == f"CUDACXX={missing} is not there"


def test_no_compiler_at_all(project, tmp_path):
    tag, _, record, _ = build_wheel(project, PATH=str(tmp_path))
    assert tag == "py3-none-any"
    assert "no C++ compiler was found" in record["cpu"]["reason"]
    assert "no nvcc was found" in record["cuda"]["reason"]


@pytest.mark.skipif(sys.platform == "win32", reason="the failing compiler is a shell script")
def test_a_compiler_that_fails(project, tmp_path):
    compiler = failing_compiler(tmp_path)
    tag, native, record, output = build_wheel(project, CXX=compiler, SWKERNELS_BUILD_CUDA="0")
    assert tag == "py3-none-any"
    assert native == {"build.json"}
    assert "no such thing as C++17" in record["cpu"]["reason"]
    warnings = [line for line in output.splitlines() if "no such thing as C++17" in line]
    assert len(warnings) == 1
    assert "libswkernels_cpu could not be built" in warnings[0]


@pytest.mark.skipif(sys.platform == "win32", reason="the failing compiler is a shell script")
@pytest.mark.parametrize("library, variable", [("CPU", "CXX"), ("CUDA", "CUDACXX")])
def test_a_build_that_must_succeed(project, tmp_path, library, variable):
    switches = {"SWKERNELS_BUILD_CPU": "0", "SWKERNELS_BUILD_CUDA": "0"}
    switches[f"SWKERNELS_BUILD_{library}"] = "1"
    for compiler, words in (
        ("/nowhere/c++", "/nowhere/c++ is not there"),
        (failing_compiler(tmp_path), ""),
    ):
        result = setup(project, "bdist_wheel", **switches, **{variable: compiler})
        assert result.returncode != 0
        assert f"SWKERNELS_BUILD_{library}=1, but: " in result.stderr
        assert words in result.stderr
        assert not (project / "dist").exists()


def test_a_switch_that_means_nothing(project):
    result = setup(project, "bdist_wheel", SWKERNELS_BUILD_CPU="yes")
    assert result.returncode != 0
    assert "SWKERNELS_BUILD_CPU must be 0 or 1, got 'yes'" in result.stderr


@needs_cxx
def test_a_wheel_with_the_cpu_library(project, tmp_path):
    switches = {"SWKERNELS_BUILD_CPU": "1", "SWKERNELS_BUILD_CUDA": "0"}
    tag, native, record, _ = build_wheel(project, CXXFLAGS="-O0", **switches)
    assert tag.startswith("py3-none-") and not tag.endswith("-any")
    assert native == {"build.json", CPU}
    assert record["cpu"]["built"] and record["cpu"]["reason"] is None
    assert " -O0 " in record["cpu"]["command"] and str(project) not in record["cpu"]["command"]

    (wheel,) = (project / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import torch, swkernels\n"
        "from swkernels import ops\n"
        "from swkernels.backends import cpu\n"
        "x = torch.tensor([[1.0, -3.0], [2.0, 3.0]])\n"
        "values, tokens = ops.peaks(ops.column_absmax(x, backend='cpu'))\n"
        "print(swkernels.__file__, cpu.available(), values.tolist(), tokens.tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True
    )
    package = installed / "swkernels" / "__init__.py"
    assert result.stdout.strip() == f"{package} None [2.0, 3.0] [1, 0]"

    # The same tree again without the library: nothing of the first build is left in the wheel.
    shutil.rmtree(project / "dist")
    tag, native, _, _ = build_wheel(project, SWKERNELS_BUILD_CPU="0", SWKERNELS_BUILD_CUDA="0")
    assert (tag, native) == ("py3-none-any", {"build.json"})


@needs_nvcc
def test_a_wheel_with_the_cuda_library(project):
    switches = {"SWKERNELS_BUILD_CPU": "0", "SWKERNELS_BUILD_CUDA": "1"}
    tag, native, record, _ = build_wheel(project, SWKERNELS_CUDA_ARCHS="sm_80; sm_90", **switches)
    assert tag.startswith("py3-none-") and not tag.endswith("-any")
    assert native == {"build.json", CUDA}
    targets = [word for word in record["cuda"]["command"].split() if "gencode" in word]
    assert targets == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@needs_cxx
def test_an_editable_install_builds_in_the_source_tree(project):
    result = setup(project, "editable_wheel", SWKERNELS_BUILD_CUDA="0", CXXFLAGS="-O0")
    assert result.returncode == 0, result.stdout + result.stderr
    native = {path.name for path in (project / "swkernels" / "_native").iterdir()}
    assert native == {"build.json", CPU}


def test_the_source_distribution_holds_the_native_sources(project):
    result = setup(project, "sdist")
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    names = subprocess.run(
        [sys.executable, "-m", "tarfile", "-l", str(archive)],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    inside = {name.split("/", 1)[1].strip() for name in names if "/" in name}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert ours <= inside
    assert {"setup.py", "pyproject.toml", "swkernels/backends/native.py"} <= inside
