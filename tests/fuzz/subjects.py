"""What is mutated: how each is made, read, and judged when it was accepted all the same.

The judge is independent of the reader: the safetensors library, Python's own json, the consumers
of a document. It raises AssertionError where something was accepted that should not have been.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save, save_file

from swkernels.detect import loading, page, table
from swkernels.detect.ranks import Ranks
from swkernels.detect.report import ScanReport
from swkernels.detect.scan import scan
from swkernels.detect.state import ScanState
from swkernels.detect.state_tensors import digest
from swkernels.errors import InvalidInput
from swkernels.evidence.compare_reports import read_reports
from swkernels.guard.manifest import Manifest, canonical
from swkernels.integrations.peft.lora.config import MaskedLoraConfig
from swkernels.models.checkpoint import INDEX, weight_files
from swkernels.models.gguf_head import check_gguf_head
from swkernels.models.safetensors_header import load_header
from swkernels.quant.config import QuantConfig
from swkernels.quant.report import LayerReport, QuantReport
from swkernels.train.coordinates import Coordinates, Site
from swkernels.train.delta_top import delta_top
from tests.detect import fake_report
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids

from .mutate import mutate_bytes, mutate_json

_ITEM_BITS = {"F4": 4, "U8": 8, "F8_E4M3": 8, "I8": 8, "BOOL": 8, "F16": 16, "BF16": 16,
              "F32": 32, "I32": 32, "F64": 64, "I64": 64}  # fmt: skip


class Subject:
    """A kind of file. ``original`` is intact, ``donor`` gives what is spliced in."""

    name: str
    file: str  # what it is called in the folder

    def __init__(self, folder: Path):
        self.folder = folder / type(self).__name__
        self.folder.mkdir()
        self.path = self.folder / self.file
        self.original, self.donor = self.build()
        self.path.write_bytes(self.original)
        self.judge(self.read())  # the intact one is accepted, and its judge agrees

    def build(self) -> tuple[bytes, bytes]:
        raise NotImplementedError

    def mutant(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, self.original, self.donor)
        return mutate_json(rng, json.loads(self.original), json.loads(self.donor))

    def read(self) -> object:
        raise NotImplementedError

    def judge(self, accepted: object) -> None:
        raise NotImplementedError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed.weight": torch.arange(24.0).view(6, 4),
        "layers.0.weight": torch.ones(3, 5, dtype=torch.bfloat16),
        "layers.1.weight": torch.ones(2, 2, 2, dtype=torch.int8),
        "scale": torch.tensor(1.0),
        "empty": torch.zeros(0, 7),
        "codes": torch.arange(9, dtype=torch.uint8),
    }


class Header(Subject):
    """A whole safetensors file: its length, its header, its data."""

    file = "model.safetensors"

    def build(self):
        return save(tensors(), {"format": "pt"}), save({"b": torch.zeros(3)}, {"x": "y"})

    def mutant(self, rng):
        if rng.random() < 0.3:
            return mutate_bytes(rng, self.original, self.donor)
        size = int.from_bytes(self.original[:8], "little")
        header, data = self.original[8 : 8 + size], self.original[8 + size :]
        other = json.loads(self.donor[8 : 8 + int.from_bytes(self.donor[:8], "little")])
        if rng.random() < 0.25:
            header = mutate_bytes(rng, header, self.donor)
        else:
            header = mutate_json(rng, json.loads(header), other)
        length = len(header)
        if rng.random() < 0.1:
            length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        return length.to_bytes(8, "little") + header + data

    def read(self):
        return load_header(self.path)

    def judge(self, accepted):
        with safe_open(self.path, "pt") as file:  # the library accepts it too
            assert set(file.keys()) == accepted.tensors.keys()
            assert (file.metadata() or {}) == accepted.metadata
            for name, entry in accepted.tensors.items():
                part = file.get_slice(name)
                assert part.get_shape() == entry["shape"] and part.get_dtype() == entry["dtype"]
                bits = _ITEM_BITS.get(entry["dtype"])
                begin, end = entry["data_offsets"]
                if bits:
                    assert math.prod(entry["shape"]) * bits == 8 * (end - begin)
        covered = sum(
            e["data_offsets"][1] - e["data_offsets"][0] for e in accepted.tensors.values()
        )
        assert 8 + len(accepted.raw) + covered == self.path.stat().st_size


class Index(Subject):
    """The index of a checkpoint of three files."""

    file = INDEX

    def build(self):
        names = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
                 "d": "Three.safetensors"}  # fmt: skip
        for file in set(names.values()):
            held = {name: torch.zeros(2) for name in names if names[name] == file}
            save_file(held, self.folder / file)
        (self.folder.parent / "outside.safetensors").write_bytes(save({"a": torch.zeros(2)}))
        document = {"metadata": {"total_size": 32}, "weight_map": names}
        other = {"weight_map": {"a": "../outside.safetensors", "c": "TWO.safetensors"}}
        return json.dumps(document).encode(), json.dumps(other).encode()

    def read(self):
        return weight_files(self.folder)

    def judge(self, accepted):
        places = json.loads(self.path.read_bytes())["weight_map"]
        assert {self.folder / name for name in places.values()} == set(accepted)
        for name, file in places.items():
            path = (self.folder / file).resolve()
            assert path.parent == self.folder.resolve() and path.is_file()
            with safe_open(path, "pt") as opened:
                assert name in opened.keys()


class Config(Subject):
    """The config.json of a checkpoint."""

    file = "config.json"

    def build(self):
        save_file({"a": torch.zeros(2)}, self.folder / "model.safetensors")
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
                  "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
                  "tie_word_embeddings": False, "eos_token_id": [1, 2]}  # fmt: skip
        other = {"auto_map": {"AutoConfig": "evil.Config"}, "quantization_config": {"bits": 4}}
        return json.dumps(config).encode(), json.dumps(other).encode()

    def read(self):
        return loading.source_of(self.folder)

    def judge(self, accepted):
        config = json.loads(self.path.read_bytes())
        assert isinstance(config, dict) and isinstance(config.get("model_type", ""), str | None)


class Report(Subject):
    """The report of a scan."""

    file = "report.json"
    pages = 0  # how many more are drawn

    def build(self):
        texts = []
        for number, document in enumerate((fake_report.found(), fake_report.not_finite())):
            path = self.folder / f"{number}.json"
            ScanReport(document).save(path)
            texts.append(path.read_bytes())
        return texts[0], texts[1]

    def read(self):
        return ScanReport.load(self.path)

    def judge(self, accepted):
        data = accepted.data
        console = Console(file=io.StringIO(), width=100, color_system=None)
        table.render(data, console)
        printed = console.file.getvalue()
        assert not [c for c in printed if c != "\n" and not c.isprintable()]
        sizes = {e["module"]: (e["rows"], e["columns"]) for e in data["layers"]}
        for c in data["candidates"]:
            rows, columns = sizes[c["module"]]
            assert 0 <= c["row"] < rows and 0 <= c["column"] < columns
        for call in (lambda: read_reports([accepted, accepted]),
                     lambda: Coordinates.from_report(accepted)):  # fmt: skip
            try:
                call()
            except InvalidInput as error:
                assert "damaged" not in str(error)
        if self.pages > 0:
            self.pages -= 1
            html = page.render(data)
            assert "<script" not in html and "\x1b" not in html


class CoordinateList(Subject):
    """Coordinates as JSON."""

    file = "coordinates.json"

    def build(self):
        for number in range(2):
            weights = {Site("layers.0.down", None): [[1, 2], [3, 4]], Site("experts", 1): [[0, 0]]}
            shapes = {site: (5 + number, 7) for site in weights}
            Coordinates(weights, shapes).save(self.folder / f"{number}.json")
        return tuple((self.folder / f"{number}.json").read_bytes() for number in range(2))

    def read(self):
        return Coordinates.load(self.path)

    def judge(self, accepted):
        for site, listed in accepted.weights.items():
            D, H = accepted.shapes[site]
            assert listed.dtype == torch.int32 and listed.shape[1] == 2 and len(listed)
            assert (listed >= 0).all() and (listed < torch.tensor([D, H])).all()
            assert len(listed.unique(dim=0)) == len(listed)


class CoordinateTensors(CoordinateList):
    """Coordinates as safetensors: the list of weights is JSON within the header's metadata."""

    file = "coordinates.safetensors"

    def build(self):
        weights = {Site("layers.0.down", None): [[1, 2], [3, 4]], Site("experts", 1): [[0, 0]]}
        Coordinates(weights, dict.fromkeys(weights, (5, 7))).save(self.path)
        whole = self.path.read_bytes()
        return whole, whole[::-1]

    def mutant(self, rng):
        if rng.random() < 0.4:
            return mutate_bytes(rng, self.original, self.donor)
        with safe_open(self.folder / "whole.safetensors", "pt") as file:
            metadata = file.metadata()
            held = {name: file.get_tensor(name) for name in file.keys()}
        listed = json.loads(metadata["weights"])
        metadata["weights"] = mutate_json(rng, listed, listed).decode("utf-8", "replace")
        if rng.random() < 0.2:
            metadata.pop(rng.choice(list(metadata)))
        if rng.random() < 0.2:
            name = rng.choice(list(held))
            held[name] = rng.choice((held[name].float(), held[name] - 9, held[name][:, :1]))
        return save({k: v.contiguous() for k, v in held.items()}, metadata)

    def __init__(self, folder):
        super().__init__(folder)
        (self.folder / "whole.safetensors").write_bytes(self.original)


class QuantizationReport(Subject):
    """The report of quantizing a model."""

    file = "quantize_report.json"

    def build(self):
        for number in range(2):
            layers = [
                LayerReport(
                    f"layers.{i}", None, (32, 48), 4, 0.05, 3, 0.2, ((1, 2, 0.5),), 2, 96, 9
                )
                for i in range(2 + number)
            ]
            report = QuantReport("M", QuantConfig(), tuple(layers), (("head", "tied"),), 900, 90)
            report.save(self.folder / f"{number}.json")
        return tuple((self.folder / f"{number}.json").read_bytes() for number in range(2))

    def read(self):
        return QuantReport.load(self.path)

    def judge(self, accepted):
        assert str(accepted) and accepted.super_weights >= 0
        for layer in accepted.layers:
            D, H = layer.shape
            assert all(0 <= r < D and 0 <= c < H for r, c, _ in layer.super_weights)
        assert {layer.name for layer in accepted.layers} <= set(_strings(self.path))


class GuardManifest(Subject):
    """The manifest of a checkpoint: a change that its hash does not cover must change nothing."""

    file = "guard.json"
    resealed = False

    def build(self):
        from swkernels import guard

        made = []
        for number in range(2):
            folder = self.folder / f"model{number}"
            folder.mkdir()
            held = {"model.layers.0.mlp.down_proj.weight": torch.ones(40, 50) * (number + 1)}
            save_file(held | tensors(), folder / "model.safetensors")
            listed = {Site("model.layers.0.mlp.down_proj", None): [[3, 4]]}
            coordinates = Coordinates(listed, dict.fromkeys(listed, (40, 50)))
            manifest = guard.create(folder, coordinates, chunk=4096)
            manifest.save(self.folder / f"{number}.json")
            made.append((self.folder / f"{number}.json").read_bytes())
        return tuple(made)

    def mutant(self, rng):
        data = super().mutant(rng)
        if not self.resealed:
            return data
        try:
            import hashlib

            document = json.loads(data)
            document["sha256"] = hashlib.sha256(canonical(document)).hexdigest()
            return json.dumps(document).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return data

    def read(self):
        return Manifest.load(self.path)

    def judge(self, accepted):
        if self.resealed:
            assert accepted.to_dict()["sha256"] == json.loads(self.path.read_bytes())["sha256"]
        else:
            assert accepted.content() == Manifest.load(self.folder / "0.json").content()


class ResealedManifest(GuardManifest):
    """A manifest whose hash was made anew after the change: only its fields can tell."""

    resealed = True


class Gguf(Subject):
    """The head of a GGUF file."""

    file = "model.gguf"

    def build(self):
        from tests.models.test_gguf_head import whole

        return whole(), whole(">")

    def mutant(self, rng):
        return mutate_bytes(rng, self.original, self.donor)

    def read(self):
        return check_gguf_head(self.path)

    def judge(self, accepted):
        """The reader that it protects ends, whatever it says; its own errors are caught later."""
        from gguf import GGUFReader

        try:
            GGUFReader(self.path)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError):
            pass


class State(Subject):
    """The state of a scan that was ended."""

    file = "scan.state"
    resealed = False

    def build(self):
        subject = self

        class Kept(ScanState):
            def begin(self, identity, ranks):
                subject.identity = identity
                super().begin(identity, ranks)

            def restore_peaks(self, record, batches):
                subject.record, subject.batches = copy.deepcopy((record, batches))
                return super().restore_peaks(record, batches)

            def remove(self):
                """The file stays, to be read again."""

        model = tiny_model("llama")
        plant(model, 1)
        options = {"length": 24, "eval_length": 12, "null_draws": 1}
        scan(model, token_ids(2, 24), state=Kept(self.path, 0), **options)
        whole = self.path.read_bytes()
        (self.folder / "whole").write_bytes(whole)
        return whole, whole[::-1]

    def mutant(self, rng):
        if not self.resealed and rng.random() < 0.5:
            return mutate_bytes(rng, self.original, self.donor)
        with safe_open(self.folder / "whole", "pt") as file:
            metadata = dict(file.metadata())
            held = {name: file.get_tensor(name) for name in file.keys()}
        if rng.random() < 0.1:
            metadata["more"] = "a note"  # changes nothing
        elif rng.random() < 0.2:
            identity = json.loads(metadata["identity"])
            metadata["identity"] = mutate_json(rng, identity, identity).decode("utf-8", "replace")
        else:
            name = rng.choice(list(held))
            tensor = held[name].clone()
            kind = rng.randrange(4)
            if kind == 0 or not tensor.numel():
                held.pop(name)
            elif kind == 1:
                held[name] = tensor.flatten()[: rng.randrange(tensor.numel())].contiguous()
            elif kind == 2:
                held[name] = tensor.to(rng.choice((torch.float32, torch.int32, torch.int64)))
            else:
                value = rng.choice((0, 1, -1, 2**31 - 1, 2**62))
                tensor.view(-1)[rng.randrange(tensor.numel())] = value
                held[name] = tensor
        if self.resealed:
            metadata["sha256"] = digest(metadata["identity"], held)
        return save(held, metadata)

    def read(self):
        state = ScanState(self.path)
        state.begin(self.identity, Ranks.alone())
        return state.restore_peaks(self.record, self.batches)

    def judge(self, accepted):
        assert accepted <= {batch.first for batch in self.batches}
        with safe_open(self.path, "pt") as found, safe_open(self.folder / "whole", "pt") as whole:
            assert set(found.keys()) == set(whole.keys())
            for name in whole.keys():
                theirs, ours = found.get_tensor(name), whole.get_tensor(name)
                assert theirs.dtype == ours.dtype
                assert self.resealed or torch.equal(theirs, ours)


class ResealedState(State):
    """A state whose checksum was made anew after the change."""

    resealed = True


class AdapterConfig(Subject):
    """The configuration of a LoRA by PEFT, whose update is ranked."""

    file = "adapter_config.json"

    def build(self):
        factors = {f"base_model.model.m.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        save_file(factors, self.folder / "adapter_model.safetensors")
        config = {"lora_alpha": 4, "use_rslora": True, "r": 2, "alpha_pattern": {"m": 8, "x.y": 1}}
        return json.dumps(config).encode(), json.dumps({"target_modules": ["m", 5]}).encode()

    def read(self):
        return delta_top(self.folder, 3)

    def judge(self, accepted):
        config = json.loads(self.path.read_bytes())
        assert isinstance(config["lora_alpha"], int | float)
        assert all(math.isfinite(entry[3]) for entry in accepted.entries)


class MaskFile(Subject):
    """The coordinates beside a masked LoRA."""

    file = "swkernels_mask.json"

    def build(self):
        document = {"format": "swkernels.lora_mask/1", "rank_pattern": {},
                    "alpha_pattern": {"a": 1.5}, "mask": "rows", "mask_scale": 0.5,
                    "hold": False, "strict": True,
                    "coordinates": [["m.down", [[1, 2], [3, 4]]], [7, [[0, 0]]]]}  # fmt: skip
        other = {"coordinates": [["n", [[2**40, 1]]]], "mask": "columns"}
        return json.dumps(document).encode(), json.dumps(other).encode()

    def read(self):
        from swkernels.integrations.peft.lora.config import _read

        return MaskedLoraConfig(r=4, **_read(self.path))

    def judge(self, accepted):
        for pairs in accepted._listed.listed.values():
            assert pairs.dtype == torch.int64 and pairs.shape[1] == 2 and (pairs >= 0).all()


ALL = (Header, Index, Config, Report, CoordinateList, CoordinateTensors, QuantizationReport,
       State, ResealedState, AdapterConfig, MaskFile, GuardManifest, ResealedManifest,
       Gguf)  # fmt: skip


def _strings(path: Path) -> list[str]:
    found: list[str] = []

    def walk(value):
        if isinstance(value, str):
            found.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (dict, list, str)):
                found.append(item) if isinstance(item, str) else walk(item)

    walk(json.loads(path.read_bytes()))
    return found
