"""``swkernels doctor``, and the command's own options."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from swkernels import __version__, backends
from swkernels.cli import app, main


def doctor() -> str:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_every_operation_and_backend_is_shown():
    shown = doctor()
    for row in backends.explain("cpu"):
        line = next(line for line in shown.splitlines() if row["op"] in line)
        assert row["backend"] in line
        assert all(name in shown for name in row["others"])


def test_versions_and_absent_packages(monkeypatch):
    from importlib import metadata

    import torch

    real = metadata.version

    def version(package):
        if package in ("peft", "swkernels"):
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    lines = doctor().splitlines()

    def row(package):
        return next(line for line in lines if line.startswith(f"│ {package} "))

    assert "absent" in row("peft")
    assert real("torch") in row("torch")
    assert __version__ in row("swkernels")
    assert f"{torch.get_num_threads()} threads" in row("cpu")


def test_a_library_that_is_not_built_and_a_bad_choice_are_shown(monkeypatch):
    from swkernels.backends import cpu, native
    from swkernels.errors import BackendUnavailable

    def isa():
        raise BackendUnavailable("no library here")

    monkeypatch.setattr(native, "problem", lambda name: f"the {name} library was not built")
    monkeypatch.setattr(cpu, "isa", isa)
    monkeypatch.setenv("SWKERNELS_BACKEND", "magic")
    shown = doctor()
    assert "the cuda library was not built" in shown
    assert "no library here" in shown
    assert "unknown backend 'magic'" in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("swkernels ")


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["scan"], ["doctor", "extra"]])
def test_usage_errors_are_one_line(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from swkernels.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "scan" in result.stdout and "doctor" in result.stdout
