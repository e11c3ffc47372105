"""``swkernels quantize``: from a name to a packed checkpoint that keeps its super weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import quantized
from .inputs import load_quantized
from .output import make_console, stages

# The defaults shown are QuantConfig's; a test compares.
_MODEL = typer.Argument(
    metavar="MODEL", help="A directory, a .gguf file or a name on the Hugging Face hub."
)
_OUTPUT = typer.Option("-o", "--output", help="Folder for the checkpoint; it must not be there.")
_SUPER_WEIGHTS = typer.Option(
    help="What is kept exactly: a scan's report or a file of coordinates (.json, .safetensors)."
)
_BITS = typer.Option(help="4 or 8: short for --code int4 and int8.")
_CODE = typer.Option(help="int4, int8, nf4 or fp4.", show_default="int4")
_SYMMETRIC = typer.Option(
    "--symmetric/--asymmetric", help="Asymmetric integers have a zero point in each block.",
    show_default="symmetric",
)  # fmt: skip
_BLOCK = typer.Option(
    help="Elements of the flattened matrix, tiles RxC, row, channel or tensor.", show_default="64"
)
_CLIP = typer.Option(
    help="How ranges are cut: zscore=9, zscore_signed=9, percentile=99.9, count=1 or search=0.5.",
    show_default="not at all",
)
_SCALES = typer.Option(help="float32, float16 or int8.", show_default="float32")
_LARGEST = typer.Option(help="Keep so many of the largest weights exactly too.", show_default="0")
_LARGEST_PER = typer.Option(help="Of every tensor or of every block.", show_default="tensor")
_EMBEDDINGS = typer.Option(
    help="A code for the embeddings and the head.", show_default="they are left as they are"
)
_INCLUDE = typer.Option(
    help="Pattern of layers to quantize, such as down_proj or 'layers.0.*'. Repeatable.",
    show_default="every linear layer of the blocks",
)
_EXCLUDE = typer.Option(help="Pattern of layers that are left as they are. Repeatable.")
_DEVICE = typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="a GPU if there is one")
_DTYPE = typer.Option(
    help="auto, float32, bfloat16 or float16, for what is not packed.", show_default="auto"
)
_TRUST = typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
_FORCE = typer.Option("--force", help="Replace the model that is in the folder, as a whole.")
_DRY_RUN = typer.Option("--dry-run", help="Quantize and report, write nothing.")


def quantize(
    model: Annotated[str, _MODEL],
    output: Annotated[Path | None, _OUTPUT] = None,
    super_weights: Annotated[Path | None, _SUPER_WEIGHTS] = None,
    bits: Annotated[int | None, _BITS] = None,
    code: Annotated[str | None, _CODE] = None,
    symmetric: Annotated[bool | None, _SYMMETRIC] = None,
    block: Annotated[str | None, _BLOCK] = None,
    clip: Annotated[str | None, _CLIP] = None,
    scales: Annotated[str | None, _SCALES] = None,
    largest: Annotated[int | None, _LARGEST] = None,
    largest_per: Annotated[str | None, _LARGEST_PER] = None,
    embeddings: Annotated[str | None, _EMBEDDINGS] = None,
    include: Annotated[list[str] | None, _INCLUDE] = None,
    exclude: Annotated[list[str] | None, _EXCLUDE] = None,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    force: Annotated[bool, _FORCE] = False,
    dry_run: Annotated[bool, _DRY_RUN] = False,
) -> None:
    """Pack the weights of MODEL in 4 or 8 bits and keep its super weights exactly."""
    from safetensors import SafetensorError

    from swkernels.detect import loading
    from swkernels.errors import InvalidInput
    from swkernels.files import in_folder
    from swkernels.models.unchanged import Watch
    from swkernels.quant.super_weights import read_super_weights

    config = _config(
        bits, code=code, symmetric=symmetric, block_size=block, clip=clip, scale_dtype=scales,
        largest=largest, largest_per=largest_per, embeddings=embeddings, include=include,
        exclude=exclude,
    )  # fmt: skip
    _check_output(model, output, force, dry_run)
    loading.check_device(device)
    loading.check_dtype(dtype)
    _check_model(model)
    kept = None if super_weights is None else read_super_weights(super_weights)
    console = make_console()
    with stages(console) as progress:

        def make(folder: Path | None):
            watch = Watch(loading.files_of(model))
            loaded, tokenizer, fingerprint, report = load_quantized(
                model, config, kept, progress, device=device, dtype=dtype,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            source = quantized.source_of_model(model, fingerprint, loaded.dtype, super_weights)
            if folder is not None:
                progress("saving", 0, 1)
                with loading.quiet():
                    loaded.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
                text = quantized.render_report(report, source)
                (folder / quantized.REPORT).write_text(text, encoding="utf-8")
                progress("saving", 1, 1)
            watch.check()  # what was saved may have been read until now
            reports.append(report)

        reports: list = []
        if dry_run:
            make(None)
        else:
            try:
                in_folder(output, "config.json", make)
            except SafetensorError as error:  # what it makes of a full disk
                raise InvalidInput(f"cannot write {output}: {error}") from error
    quantized.show_report(reports[0], console)
    if not dry_run:
        console.print(str(output), soft_wrap=True, markup=False)


def _config(bits: int | None, **options):
    """The QuantConfig of the options, those that were given."""
    from swkernels.errors import InvalidInput
    from swkernels.quant.config import QuantConfig

    if bits is not None:
        if options["code"] is not None:
            raise InvalidInput("--bits and --code exclude each other: give one of them")
        if bits not in (4, 8):
            raise InvalidInput(f"--bits must be 4 or 8, got {bits}")
        options["code"] = f"int{bits}"
    given = {name: value for name, value in options.items() if value is not None}
    for name, read in {"block_size": block_of, "clip": clip_of}.items():
        if name in given:
            given[name] = read(given[name])
    return QuantConfig(**given)


def _check_model(model: str) -> None:
    """Refuse a model that is not there, or quantized, before it is read."""
    from swkernels.detect import loading
    from swkernels.errors import InvalidInput
    from swkernels.files import read_json

    where, options = loading.source_of(model)
    path = Path(where) / "config.json"
    if options or not path.is_file():
        return  # a GGUF file is unpacked as it is read; a name's files are on the hub
    found = read_json(path)
    method = found.get("quantization_config") if isinstance(found, dict) else None
    if method is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else None
        raise InvalidInput(
            f"{model} is quantized already ({kind}): give the model that it was made of"
        )


def _check_output(model: str, output: Path | None, force: bool, dry_run: bool) -> None:
    """Refuse a place that cannot be, before a model is read."""
    from swkernels.errors import InvalidInput

    if output is None:
        if not dry_run:
            raise InvalidInput("where does it go? Give --output, or --dry-run to write nothing")
        return
    source = Path(model).expanduser()
    if source.exists() and source.resolve().is_relative_to(output.resolve()):
        raise InvalidInput(f"{output} holds {model} itself: give another --output")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not force:
        raise InvalidInput(f"{output} is there: give another --output, or --force to replace it")
    if output.exists() and not (output / "config.json").is_file():
        raise InvalidInput(f"{output} is no model, and is not replaced: give another --output")


def block_of(text: str) -> int | tuple[int, int] | str:
    """The block size that ``--block`` means; what is wrong with it, QuantConfig says."""
    parts = text.lower().split("x")
    if len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts):
        sizes = tuple(map(int, parts))
        return sizes if len(sizes) == 2 else sizes[0]
    return text


def clip_of(text: str):
    """The clip that ``--clip BY=VALUE`` means.

    Raises:
        InvalidInput: not of that form, or no clip.
    """
    from swkernels.backends.plan import Clip
    from swkernels.errors import InvalidInput

    by, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError as error:
        raise InvalidInput(
            f"--clip must be a rule and a number, such as zscore=9, got {text!r}"
        ) from error
    return Clip(by, int(number) if number.is_integer() else number)
