"""``swkernels doctor``: what is installed, what is there, and what serves each operation."""

from __future__ import annotations

from .output import make_console

PACKAGES = (
    "swkernels", "torch", "transformers", "triton", "safetensors", "accelerate", "gguf",
    "datasets", "peft", "bitsandbytes",
)  # fmt: skip


def doctor() -> None:
    """Show versions, devices, native libraries, and which backend serves each operation."""
    console = make_console()
    _table(console, "Versions", ("package", "version"), _versions())
    _table(console, "Devices", ("device", "what it is"), _devices())
    _table(console, "Native libraries", ("library", "state"), _libraries())
    for device in _device_names():
        _table(
            console,
            f"Operations on {device}",
            ("operation", "backend", "why, and why not the others"),
            _operations(device),
        )
    _table(console, "Tuning files, in the order of lookups", ("for", "records", "file"), _tuning())


def _table(console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_lines=len(columns) > 2)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def _versions() -> list[tuple[str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, _source_version() if package == "swkernels" else "absent"))
    return rows


def _source_version() -> str:
    from swkernels import __version__

    return f"{__version__} (not installed, run from its source)"


def _device_names() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads, {_isa()}")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = gpu.total_memory / 2**30
        rows.append((f"cuda:{i}", f"{gpu.name}, {gpu.major}.{gpu.minor}, {memory:.0f} GiB"))
    if len(rows) == 1:
        rows.append(("cuda", "none: PyTorch sees no GPU"))
    return rows


def _cpu_name() -> str:
    import platform
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _isa() -> str:
    from swkernels.backends import cpu
    from swkernels.errors import BackendUnavailable

    try:
        return f"instruction set {cpu.isa()}"
    except BackendUnavailable as error:
        return f"no native instruction set: {error}"


def _libraries() -> list[tuple[str, str]]:
    from swkernels.backends import native

    record = native.build_record()
    rows = []
    for name in ("cpu", "cuda"):
        compiler = record.get(name, {}).get("compiler") or "an unrecorded compiler"
        rows.append((name, native.problem(name) or f"loaded, built by {compiler}"))
    return rows


def _operations(device: str) -> list[tuple[str, str, str]]:
    from swkernels import backends
    from swkernels.errors import BackendUnavailable

    try:
        served = backends.explain(device)
    except BackendUnavailable as error:  # SWKERNELS_BACKEND asks for what is not there
        return [(op, "none", str(error)) for op in backends.OPERATIONS]
    return [
        (
            row["op"],
            row["backend"],
            "\n".join([row["reason"], *(f"{name}: {why}" for name, why in row["others"].items())]),
        )
        for row in served
    ]


def _tuning() -> list[tuple[str, str, str]]:
    import torch

    from swkernels import tuning
    from swkernels.errors import InvalidInput

    here = {torch.cuda.get_device_name(i): f"cuda:{i}" for i in range(torch.cuda.device_count())}
    rows = []
    for path in tuning.paths():
        try:
            content = tuning.read(path)
        except InvalidInput as error:
            rows.append(("nothing", str(error), str(path)))
            continue
        name = content.get("device")
        device = "any device" if name is None else f"{name} ({here.get(name, 'not here')})"
        kind = "measured" if content.get("measured") else "not measured"
        rows.append((device, f"{len(content['records'])}, {kind}", str(path)))
    return rows
