"""``swkernels train``: train chosen weights of a model on a text, from a name to an adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import trained
from .inputs import load_model
from .output import OutputDirectory

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
    from swkernels.detect.report import versions
    from swkernels.quant.super_weights import read_super_weights
    from swkernels.train import loop, sparse
    from swkernels.train.data import read_examples, read_source

    given = {
        "steps": steps, "epochs": epochs, "batch_size": batch_size, "accumulate": accumulate,
        "learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay,
        "clip": clip, "optimizer": optimizer, "seed": seed, "save_every": save_every,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    settings = loop.Settings(**given)
    choices = {
        "--coordinates": coordinates, "--catalogue": catalogue, "--magnitude": magnitude,
        "--random": random,
    }  # fmt: skip
    exports = list(dict.fromkeys(export or []))
    _check(choices, neighborhood, length, given, exports, output, resume)
    listed = None if coordinates is None else read_super_weights(coordinates)
    source = read_source(data)
    eval_source = None if eval_data is None else read_source(eval_data)
    started = time.perf_counter()
    state = output / _STATE
    with OutputDirectory(output) as folder:
        trained.say("loading the model")
        loaded, tokenizer, fingerprint = load_model(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        chosen = listed or _choose(choices, settings.seed, loaded)
        chosen = chosen.neighborhood(neighborhood) if neighborhood else chosen
        examples = read_examples(source, tokenizer, length)
        held_out = read_examples(eval_source, tokenizer, length) if eval_source else []
        _check_model(loaded, [*examples, *held_out], checkpointing)
        if checkpointing:
            _save_memory(loaded)
        handle = sparse(loaded, chosen)
        _check_exports(handle, exports)
        before = loop.mean_loss(loaded, held_out, settings.batch_size) if held_out else None
        trained.say(f"training {len(chosen)} weights on {len(examples)} sequences")
        with trained.progress(settings.count(len(examples)), state) as steps_done:
            losses = loop.fit(handle, examples, settings, state=state, on_step=steps_done)
        after = loop.mean_loss(loaded, held_out, settings.batch_size) if held_out else None
        document = {
            "schema": trained.SCHEMA,
            "model": model,
            "fingerprint": fingerprint,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(next(loaded.parameters()).device),
            "data": data,
            "eval_data": eval_data,
            "coordinates": len(chosen),
            "weights": len(chosen.weights),
            "sequences": len(examples),
            "length": length,
            "checkpointing": checkpointing,
            "settings": asdict(settings),
            "losses": losses,
            "evaluation": [before, after] if held_out else None,
            "largest_delta": max(float(v.detach().abs().max()) for v in handle.parameters()),
            "seconds_per_step": steps_done.seconds_per_step(),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": versions("torch", "transformers"),
        }
        exported = trained.export(handle, exports, output)
        folder.write(trained.writers(handle, document))
        # Only now: whatever failed above can be tried again with --resume, without training anew.
        state.unlink(missing_ok=True)
    trained.show(document, [*folder.written, *exported])


def _check(
    choices: dict, radius: int, length: int, given: dict, exports: list[str], output: Path,
    resume: bool,
) -> None:  # fmt: skip
    """Refuse what cannot work before a text or a model is read."""
    from swkernels.errors import InvalidInput

    named = [name for name, value in choices.items() if value is not None]
    if len(named) != 1:
        raise InvalidInput(
            f"expected one of {', '.join(choices)} to say which weights are trained, got "
            f"{', '.join(named) or 'none'}"
        )
    if radius < 0:
        raise InvalidInput(f"--neighborhood must be at least 0, got {radius}")
    if length < 2:
        raise InvalidInput(f"--length must be at least 2, got {length}")
    if "steps" in given and "epochs" in given:
        raise InvalidInput("--steps and --epochs exclude each other: give one of them")
    unknown = sorted(set(exports) - set(trained.EXPORTS))
    if unknown:
        raise InvalidInput(f"--export must be lora or checkpoint, got {', '.join(unknown)}")
    interrupted = (output / _STATE).exists()
    if interrupted and not resume:
        raise InvalidInput(
            f"{output} holds a run that was interrupted: give --resume to go on with it, or "
            "another --output"
        )
    if resume and not interrupted:
        raise InvalidInput(f"{output} holds no interrupted run: leave out --resume")


def _choose(choices: dict, seed: int, model):
    """The coordinates that the options name, in this model."""
    from swkernels.train import Coordinates

    if choices["--catalogue"] is not None:
        return Coordinates.from_catalogue(choices["--catalogue"], model)
    if choices["--magnitude"] is not None:
        return Coordinates.from_magnitude(model, choices["--magnitude"])
    return Coordinates.random(model, choices["--random"], seed=seed)


def _check_model(model, examples: list, checkpointing: bool) -> None:
    """Refuse a model that cannot be trained on these sequences, before a step fails halfway."""
    from swkernels.detect.samples import check_vocabulary, most_positions
    from swkernels.errors import InvalidInput

    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise InvalidInput(
            f"{name} is an encoder and a decoder, which predict no text that goes on: give a "
            "decoder, or train it with swkernels.train.sparse and a trainer of yours"
        )
    positions = most_positions(model)
    longest = max(len(example.ids) for example in examples)
    if positions is not None and longest > positions:
        raise InvalidInput(
            f"sequences of {longest} tokens do not fit the {positions} positions of {name}: give "
            f"--length {positions} or less"
        )
    check_vocabulary(model, [example.ids for example in examples])
    if checkpointing and not model.supports_gradient_checkpointing:
        raise InvalidInput(f"{name} cannot recompute activations: leave out --checkpointing")


def _save_memory(model) -> None:
    # transformers 5 renamed the method on the way.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _check_exports(handle, exports: list[str]) -> None:
    """Refuse before training what could not be exported after it."""
    from swkernels.train.export import lora_rank

    if "lora" in exports:
        lora_rank(handle)
    if "checkpoint" in exports:
        for site in handle.values():
            handle.target(site).matrix()
