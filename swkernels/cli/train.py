"""``swkernels train``: train chosen weights of a model on a text, from a name to an adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import OutputDirectory, make_console

SCHEMA = "swkernels.train/1"
_STATE = "state.safetensors"

# The defaults shown are those of swkernels.train.loop.Settings; a test compares.
_MODEL = typer.Argument(metavar="MODEL", help="A directory or a name on the Hugging Face hub.")
_DATA = typer.Option(
    help="A .txt file, a .jsonl file (text, or prompt and completion) or a Hugging Face data set."
)
_OUTPUT = typer.Option("-o", "--output", help="Folder for the adapter and what is known of it.")
_COORDINATES = typer.Option(help="A file of coordinates (.json, .safetensors) or a scan's report.")
_CATALOGUE = typer.Option(help="The published super weights of this model, by its name.")
_MAGNITUDE = typer.Option(help="The K largest weights of all down projections.")
_RANDOM = typer.Option(help="K random weights of all down projections.")
_NEIGHBORHOOD = typer.Option(help="And all weights within R rows and columns of them.")
_EVAL_DATA = typer.Option(help="The same kinds; its loss before and after is reported.")
_LENGTH = typer.Option(help="Tokens of a sequence.")
_STEPS = typer.Option(help="Optimizer steps.", show_default="what --epochs takes")
_EPOCHS = typer.Option(help="Passes over the data.", show_default="1")
_BATCH_SIZE = typer.Option(help="Sequences of one forward.", show_default="8")
_ACCUMULATE = typer.Option(help="Forwards of one step.", show_default="1")
_RATE = typer.Option("--learning-rate", "--lr", help="The highest.", show_default="1e-4")
_WARMUP = typer.Option(help="Share of the steps in which the rate rises.", show_default="0.05")
_DECAY = typer.Option(help="Of the deltas, towards the weights as they were.", show_default="0")
_CLIP = typer.Option(help="Largest norm of the gradient; 0: do not clip.", show_default="1")
_OPTIMIZER = typer.Option(help="adamw or adafactor.", show_default="adamw")
_SEED = typer.Option(help="Of random weights, the order of the data, dropout.", show_default="0")
_SAVE_EVERY = typer.Option(help="Steps after which the state is written.", show_default="100")
_CHECKPOINTING = typer.Option("--checkpointing", help="Recompute activations to save memory.")
_DEVICE = typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="a GPU if there is one")
_DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
_TRUST = typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
_RESUME = typer.Option("--resume", help="Go on with the run that was interrupted in the folder.")
_EXPORT = typer.Option(help="lora or checkpoint: also write that, below the folder. Repeatable.")


def train(
    model: Annotated[str, _MODEL],
    data: Annotated[str, _DATA],
    output: Annotated[Path, _OUTPUT],
    coordinates: Annotated[Path | None, _COORDINATES] = None,
    catalogue: Annotated[str | None, _CATALOGUE] = None,
    magnitude: Annotated[int | None, _MAGNITUDE] = None,
    random: Annotated[int | None, _RANDOM] = None,
    neighborhood: Annotated[int, _NEIGHBORHOOD] = 0,
    eval_data: Annotated[str | None, _EVAL_DATA] = None,
    length: Annotated[int, _LENGTH] = 512,
    steps: Annotated[int | None, _STEPS] = None,
    epochs: Annotated[float | None, _EPOCHS] = None,
    batch_size: Annotated[int | None, _BATCH_SIZE] = None,
    accumulate: Annotated[int | None, _ACCUMULATE] = None,
    learning_rate: Annotated[float | None, _RATE] = None,
    warmup: Annotated[float | None, _WARMUP] = None,
    weight_decay: Annotated[float | None, _DECAY] = None,
    clip: Annotated[float | None, _CLIP] = None,
    optimizer: Annotated[str | None, _OPTIMIZER] = None,
    seed: Annotated[int | None, _SEED] = None,
    save_every: Annotated[int | None, _SAVE_EVERY] = None,
    checkpointing: Annotated[bool, _CHECKPOINTING] = False,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    resume: Annotated[bool, _RESUME] = False,
    export: Annotated[list[str] | None, _EXPORT] = None,
) -> None:
    """Train chosen weights of MODEL and nothing else of it."""
    from swkernels.detect import loading
    from swkernels.train import loop, sparse
    from swkernels.train.data import read_examples

    given = {
        "steps": steps, "epochs": epochs, "batch_size": batch_size, "accumulate": accumulate,
        "learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay,
        "clip": clip, "optimizer": optimizer, "seed": seed, "save_every": save_every,
    }  # fmt: skip
    settings = loop.Settings(**{name: value for name, value in given.items() if value is not None})
    choices = {
        "--coordinates": coordinates, "--catalogue": catalogue, "--magnitude": magnitude,
        "--random": random,
    }  # fmt: skip
    _check(choices, export or [], output, resume)
    started = time.perf_counter()
    console = make_console()
    with OutputDirectory(output) as folder:
        console.print("loading the model")
        loaded, tokenizer, fingerprint = loading.load_model(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        chosen = _choose(choices, neighborhood, settings.seed, loaded)
        examples = read_examples(data, tokenizer, length)
        held_out = None if eval_data is None else read_examples(eval_data, tokenizer, length)
        if checkpointing:
            options = {"use_reentrant": False}
            loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        handle = sparse(loaded, chosen)
        before = _evaluate(held_out, loaded, settings)
        console.print(f"training {len(chosen)} weights on {len(examples)} sequences", markup=False)
        with _progress(settings.count(len(examples))) as on_step:
            state = output / _STATE
            losses = loop.fit(handle, examples, settings, state=state, on_step=on_step)
        after = _evaluate(held_out, loaded, settings)
        evaluated = None if held_out is None else (before, after)
        document = {
            "schema": SCHEMA,
            "model": model,
            "fingerprint": fingerprint,
            "data": data,
            "coordinates": len(chosen),
            "weights": len(chosen.weights),
            "sequences": len(examples),
            "length": length,
            "settings": asdict(settings),
            "losses": losses,
            "evaluation": evaluated,
            "largest_delta": max(float(v.detach().abs().max()) for v in handle.parameters()),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": _versions(),
        }
        exported = _export(handle, export or [], output)
        folder.write(_writers(handle, document))
        state.unlink(missing_ok=True)
    _show(document, [*folder.written, *exported], console)


def _check(choices: dict, export: list[str], output: Path, resume: bool) -> None:
    """Refuse what cannot work before a model is loaded."""
    from swkernels.errors import InvalidInput

    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise InvalidInput(
            f"expected one of {', '.join(choices)} to say which weights are trained, got "
            f"{', '.join(given) or 'none'}"
        )
    unknown = set(export) - {"lora", "checkpoint"}
    if unknown:
        raise InvalidInput(f"--export must be lora or checkpoint, got {', '.join(sorted(unknown))}")
    interrupted = (output / _STATE).exists()
    if interrupted and not resume:
        raise InvalidInput(
            f"{output} holds a run that was interrupted: give --resume to go on with it, or "
            "another --output"
        )
    if resume and not interrupted:
        raise InvalidInput(f"{output} holds no interrupted run: leave out --resume")


def _choose(choices: dict, radius: int, seed: int, model):
    """The coordinates that the options name, in this model."""
    from swkernels.train import Coordinates
    from swkernels.train.files import SCHEMA as COORDINATES
    from swkernels.train.files import read_json

    name, value = next((name, value) for name, value in choices.items() if value is not None)
    if name == "--catalogue":
        chosen = Coordinates.from_catalogue(value, model)
    elif name == "--magnitude":
        chosen = Coordinates.from_magnitude(model, value)
    elif name == "--random":
        chosen = Coordinates.random(model, value, seed=seed)
    else:
        is_json = value.suffix.lower() == ".json"
        document = read_json(value) if is_json else None
        is_report = isinstance(document, dict) and document.get("schema") != COORDINATES
        chosen = Coordinates.from_report(document) if is_report else Coordinates.load(value)
    return chosen.neighborhood(radius) if radius else chosen


def _evaluate(examples, model, settings) -> float | None:
    from swkernels.train.loop import mean_loss

    return None if examples is None else mean_loss(model, examples, settings.batch_size)


@contextmanager
def _progress(steps: int) -> Iterator:
    """Yield ``on_step``: a bar with the loss on a terminal, else a line for each tenth."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        task = bars.add_task("loss", total=steps)

        def on_step(done: int, total: int, loss: float) -> None:
            bars.update(task, completed=done, description=f"loss {loss:.4f}")
            if not console.is_terminal and (done == total or done % max(1, total // 10) == 0):
                console.print(f"step {done} of {total}: loss {loss:.4f}")

        yield on_step


def _export(handle, export: list[str], output: Path) -> list[Path]:
    from swkernels.train import to_checkpoint, to_lora

    writers = {"lora": to_lora, "checkpoint": to_checkpoint}
    for name in export:
        writers[name](handle, output / name)
    return [output / name for name in export]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


def _writers(handle, document: dict) -> dict:
    """What writes each file; train.json last, as the sign of success."""
    from swkernels.train.files import write_atomically
    from swkernels.train.plot import loss_png

    figure = loss_png(document["losses"], document["evaluation"])
    text = json.dumps(document, indent=2) + "\n"
    return {
        "adapter.safetensors": handle.save,
        "coordinates.json": handle.coordinates.save,
        "loss.png": lambda path: write_atomically(path, figure),
        "train.json": lambda path: write_atomically(path, text.encode()),
    }


def _show(document: dict, written: list[Path], console) -> None:
    losses = document["losses"]
    console.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    if document["evaluation"]:
        before, after = document["evaluation"]
        console.print(f"evaluation loss {before:.4f} -> {after:.4f}")
    console.print(
        f"{document['coordinates']} weights in {document['weights']} matrices, largest change "
        f"{document['largest_delta']:.3g}, {document['seconds']:.0f} s"
    )
    for path in written:
        console.print(str(path), soft_wrap=True, markup=False)
