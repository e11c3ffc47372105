"""Manifests of checkpoints: what is found, what is not, what is put back."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import random
import shutil

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.guard import Manifest, create, digest_chunks, mapped, reading, repair, verify
from swkernels.guard.manifest import canonical
from swkernels.guard.parse import parse
from swkernels.guard.reading import Stretch, digest_stretches
from swkernels.models.checkpoint import DTYPES, INDEX
from swkernels.train import Coordinates
from tests.detect import fake_report
from tests.guard.checkpoints import (
    CHUNK,
    NAME,
    PLACES,
    D,
    H,
    coordinates,
    flip,
    flip_in,
    tensors,
    write,
)  # fmt: skip

KEY = b"sixteen bytes or more"
WEIGHT = f"{NAME.format(1)}.weight"
UNKNOWN_ADVICE = 9999  # what MADV_POPULATE_READ is to Linux before 5.14


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model")


@pytest.fixture
def manifest(model):
    return create(model, coordinates(), chunk=CHUNK)


def test_an_untouched_copy_is_intact_and_the_manifest_is_the_same_each_time(
    model, manifest, tmp_path
):
    again = shutil.copytree(model, tmp_path / "again")
    assert verify(again, manifest).status == "intact"
    assert create(model, coordinates(), chunk=CHUNK, threads=3) == manifest
    assert manifest.architecture == "LlamaForCausalLM" and manifest.model == "model"
    assert {file.name for file in manifest.others} == {"config.json", "tokenizer.json"}


def test_super_weights_are_written_down_bit_by_bit(manifest):
    found = {(w.module, w.row, w.column): w for w in manifest.super_weights}
    assert len(found) == 3
    for layer, places in PLACES.items():
        for row, column in places:
            weight = found[NAME.format(layer), row, column]
            held = tensors()[weight.tensor]
            assert weight.value == held[row, column].item()
            assert weight.element == row * H + column
            stored = held.view(torch.uint8).flatten()[2 * weight.element :][:2]
            assert bytes.fromhex(weight.bits) == bytes(stored.tolist())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_hashed_as_its_bytes_and_restored(tmp_path, dtype):
    held = (torch.randn(D, H, generator=torch.Generator().manual_seed(1)) * 20).to(DTYPES[dtype])
    held = {WEIGHT: held, "scalar": torch.tensor(3).to(DTYPES[dtype])}
    source = write(tmp_path / "m", held)
    listed = Coordinates.of({NAME.format(1): [[3, 5]]}, {(NAME.format(1), None): (D, H)})
    manifest = parse(json.loads(json.dumps(create(source, listed, chunk=CHUNK).to_dict())))
    for name, tensor in held.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        assert manifest.by_name[name].chunks == digest_chunks(data, CHUNK)
    assert manifest.by_name["scalar"].shape == ()
    size = held[WEIGHT].element_size()
    flip_in(source, WEIGHT, (3 * H + 5) * size, bit=0)
    assert len(verify(source, manifest).hits) == 1
    assert repair(source, manifest, tmp_path / "out").ok
    restored = load_file(tmp_path / "out" / "model.safetensors")[WEIGHT]
    assert torch.equal(restored.view(torch.uint8), held[WEIGHT].view(torch.uint8))


def test_damage_is_placed_by_chunk_rows_and_super_weight(model, manifest):
    element = 3 * H + 5
    flip_in(model, WEIGHT, 2 * element + 1, bit=7)
    (finding,) = verify(model, manifest).findings
    assert (finding.kind, finding.name, finding.chunks) == ("damaged chunks", WEIGHT, (0, 0))
    assert (finding.start, finding.stop, finding.rows) == (0, CHUNK, (0, 3))
    (hit,) = finding.super_weights
    assert hit.weight.row == 3 and hit.weight.column == 5
    assert hit.value == load_file(model / "model.safetensors")[WEIGHT][3, 5].item()
    assert bytes.fromhex(hit.bits)[1] == bytes.fromhex(hit.weight.bits)[1] ^ 0x80


def test_damage_across_a_border_is_one_finding_and_apart_two(model, manifest):
    for byte in (2 * CHUNK - 1, 2 * CHUNK, 6 * CHUNK):
        flip_in(model, WEIGHT, byte)
    found = verify(model, manifest)
    assert [finding.chunks for finding in found.findings] == [(1, 2), (6, 6)]
    assert not found.hits


def test_every_bit_of_the_header_counts(model, manifest):
    file = model / "model.safetensors"
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for byte in range(length):
        bit = byte * 5 % 8
        flip(file, byte, bit)
        try:
            assert verify(model, manifest, threads=1).status == "damaged", (byte, bit)
        finally:
            flip(file, byte, bit)
    assert verify(model, manifest).status == "intact"


def shard(source, target, drop_index=False):
    """Copy a checkpoint into two files, in another order."""
    shutil.copytree(source, target)
    held = load_file(source / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(held, reverse=True)
    places = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, target / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def test_a_resharded_copy_is_the_same_weights(model, manifest, tmp_path):
    sharded = shard(model, tmp_path / "sharded")
    assert verify(sharded, manifest).status == "the same weights in other files"
    back = create(sharded, coordinates(), chunk=CHUNK)
    assert verify(sharded, back).status == "intact"
    assert verify(model, back).status == "the same weights in other files"
    flip_in(sharded, WEIGHT, 5)
    found = verify(sharded, manifest)
    assert found.status == "damaged" and [f.name for f in found.findings] == [WEIGHT]
    next(sharded.glob("*-00001-*")).unlink()
    kinds = {finding.kind for finding in verify(sharded, back).findings}
    assert {"unreadable file", "missing tensor"} <= kinds


def test_a_file_under_another_name_is_the_same_weights(model, manifest, tmp_path):
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert verify(model, manifest).status == "the same weights in other files"


def change(model, name):
    held = load_file(model / "model.safetensors")
    if name == "missing tensor":
        del held[WEIGHT]
    elif name == "extra tensor":
        held["extra"] = torch.ones(3)
    elif name == "changed tensor":
        held[WEIGHT] = held[WEIGHT].view(torch.float16)
    elif name == "swapped":
        other = f"{NAME.format(2)}.weight"
        held[WEIGHT], held[other] = held[other].clone(), held[WEIGHT].clone()
    save_file(held, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", ["missing tensor", "extra tensor", "changed tensor"])
def test_other_tensors(model, manifest, kind):
    change(model, kind)
    found = verify(model, manifest)
    assert kind in [finding.kind for finding in found.findings]
    hits = 0 if kind == "extra tensor" else 2
    assert len(found.hits) == hits and all(hit.bits is None for hit in found.hits)


def test_tensors_that_change_places_under_their_names(model, manifest):
    change(model, "swapped")
    names = {finding.name for finding in verify(model, manifest).findings}
    assert names == {WEIGHT, f"{NAME.format(2)}.weight"}


def test_other_files(model, manifest):
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLX"]}')
    (model / "tokenizer.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    found = [(finding.kind, finding.name) for finding in verify(model, manifest).findings]
    assert found == [
        ("changed file", "config.json"),
        ("missing file", "tokenizer.json"),
        ("extra file", "adapter_config.json"),
    ]


def test_a_truncated_file_is_damage_and_no_checkpoint_cannot_be_checked(model, manifest, tmp_path):
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert verify(model, manifest).status == "damaged"
    with pytest.raises(InvalidInput, match="no such file"):
        verify(tmp_path / "nothing", manifest)
    file.unlink()
    with pytest.raises(InvalidInput, match="no .safetensors"):
        verify(model, manifest)


@pytest.mark.parametrize("mapping", [True, False])
@pytest.mark.parametrize("how", ["touched", "cut", "gone"])
def test_a_file_that_changes_while_it_is_read(model, manifest, monkeypatch, how, mapping):
    file = model / "model.safetensors"
    real, done = reading._chunks, []
    if not mapping:
        monkeypatch.setattr(mapped, "_POPULATE_READ", UNKNOWN_ADVICE)

    def meanwhile(run, *given):
        if run.path == file and not done:
            done.append(True)
            if how == "touched":
                os.utime(file, ns=(1, 1))
            elif how == "cut":
                os.truncate(file, 100)
            else:
                file.unlink()
        return real(run, *given)

    monkeypatch.setattr(reading, "_chunks", meanwhile)
    words = {"touched": "changed while", "cut": "was cut", "gone": "disappeared"}
    with pytest.raises(InvalidInput, match=words[how]):
        verify(model, manifest, threads=1)


@pytest.mark.parametrize("hash", ["xxh3_128", "sha256"])
@pytest.mark.parametrize("mapping", [True, False])
def test_digests_are_those_of_the_bytes(tmp_path, monkeypatch, mapping, hash):
    """Wherever a stretch begins and ends, in pages of the system or in a buffer."""
    monkeypatch.setattr(reading, "RUN", 8192)
    if not mapping:
        monkeypatch.setattr(mapped, "_POPULATE_READ", UNKNOWN_ADVICE)
    data = random.Random(3).randbytes(50_001)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:1])
    (tmp_path / "empty").write_bytes(b"")
    places = [("a", 0, 50_001), ("a", 4095, 2), ("a", 1, 40_000), ("a", 9, 0), ("b", 0, 1)]
    stretches = [Stretch(tmp_path / file, at, size) for file, at, size in places]
    stretches.append(Stretch(tmp_path / "empty", 0, 0))
    digest = getattr(xxhash, f"{hash}_digest", lambda b: hashlib.sha256(b).digest())
    for chunk in (64, 192, 4096, 12_288, 1 << 20):
        seen = []
        found = digest_stretches(
            stretches,
            chunk=chunk,
            hash=hash,
            threads=2,
            progress=lambda *p, seen=seen: seen.append(p),
        )
        for (_, at, size), digests in zip(places, found):
            bytes_ = data[at : at + size]
            chunks = [bytes_[c : c + chunk] for c in range(0, size, chunk)]
            assert digests == b"".join(map(digest, chunks))
        assert found[-1] == b""
        assert seen[-1][1:] == (sum(size for *_, size in places),) * 2


def test_pages_are_looked_at_where_they_are_and_let_go(tmp_path, monkeypatch):
    """No byte is copied, and memory does not grow with the file."""
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    monkeypatch.setattr(reading, "read_into", None)

    def held() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if "RssFile" in line)

    before, most = held(), []
    digest_stretches(
        [Stretch(tmp_path / "file", 0, size)],
        chunk=1 << 20,
        hash="xxh3_128",
        threads=2,
        progress=lambda *_: most.append(held()),
    )
    assert max(most) - before < size // 2


def test_a_file_that_is_replaced_after_its_header_was_read(model, manifest, monkeypatch):
    file = model / "model.safetensors"
    other = file.with_suffix(".new")
    shutil.copy(file, other)
    module = importlib.import_module("swkernels.guard.verify")
    real = module.look

    def then_replaced(*given):
        found = real(*given)
        os.replace(other, file)
        return found

    monkeypatch.setattr(module, "look", then_replaced)
    with pytest.raises(InvalidInput, match="changed while"):
        verify(model, manifest)


def test_repair_puts_back_and_says_what_remains(model, manifest, tmp_path):
    intact = {path.name: path.read_bytes() for path in model.iterdir()}
    flip_in(model, WEIGHT, 2 * (3 * H + 5) + 1)
    flip_in(model, WEIGHT, 2 * (40 * H + 159))
    damaged = (model / "model.safetensors").read_bytes()
    result = repair(model, manifest, tmp_path / "out")
    assert result.ok and len(result.restored) == 2 and not result.lost
    assert (model / "model.safetensors").read_bytes() == damaged
    for name, content in intact.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    flip_in(model, WEIGHT, 12 * CHUNK)
    again = repair(model, manifest, tmp_path / "out")
    assert not again.ok and [f.chunks for f in again.after.findings] == [(12, 12)]
    assert verify(tmp_path / "out", manifest).to_dict()["findings"] == [
        finding.to_dict() for finding in again.after.findings
    ]
    assert again.to_dataframe()["restored"].all()


def test_repair_refuses(model, manifest, tmp_path):
    with pytest.raises(InvalidInput, match="no super weight to put back"):
        repair(model, manifest, tmp_path / "out")
    flip_in(model, WEIGHT, 2 * (3 * H + 5))
    for place in (model, model / "inside", tmp_path):
        with pytest.raises(InvalidInput, match="where the damaged checkpoint is"):
            repair(model, manifest, place)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="choose another folder"):
        repair(model, manifest, other)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))
    else:
        yield path, value


def altered(value):
    if isinstance(value, str):
        return [value[:-1] + ("0" if value[-1:] != "0" else "1"), "", 3, None]
    if isinstance(value, list):
        return [[1], "x"]
    if value is None:
        return ["x", 0]
    return [value + 1, -1, str(value), None, True]


def test_every_field_of_a_manifest_that_is_changed_is_refused(manifest):
    document = manifest.to_dict(KEY)
    assert parse(document) == manifest
    seen = 0
    for path, value in leaves(document):
        for other in altered(value):
            changed = copy.deepcopy(document)
            place = changed
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = other
            if other == value or (path == ("hmac",) and other and isinstance(other, str)):
                continue  # the seal is compared with the key, below
            with pytest.raises(InvalidInput):
                parse(changed)
            seen += 1
    assert seen > 200
    for name in list(document):
        if name != "hmac":
            with pytest.raises(InvalidInput):
                parse({key: value for key, value in document.items() if key != name})
    with pytest.raises(InvalidInput, match="unknown"):
        parse(document | {"more": 1})


def resealed(document):
    """The document with the hash of its content as somebody would write who has changed it."""
    return document | {"sha256": hashlib.sha256(canonical(document)).hexdigest()}


def test_every_field_is_checked_also_where_the_hash_was_made_anew(manifest):
    document = manifest.to_dict()
    assert parse(resealed(document)) == manifest
    for path, _ in leaves(document):
        if path == ("sha256",):
            continue
        for other in ({}, [{}], True, 1.5, "", "\n", -1, 2**63):
            changed = copy.deepcopy(document)
            place = changed
            for step in path[:-1]:
                place = place[step]
            if place[path[-1]] == other:
                continue
            place[path[-1]] = other
            with pytest.raises(InvalidInput):
                parse(resealed(changed))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("chunk",), 2048),
        (("hash",), "xxh3_64"),
        (("tensors", 1, "shape", 0), 65),
        (("tensors", 2, "dtype"), "F32"),
        (("tensors", 1, "file"), "config.json"),
        (("tensors", 1, "digest"), "0" * 32),
        (("tensors", 2, "name"), "model.norm.weight"),
        (("files", 0, "name"), "config.json"),
        (("super_weights", 0, "element"), D * H),
        (("super_weights", 0, "tensor"), "model.empty"),
        (("super_weights", 0, "bits"), "0000"),
        (("super_weights", 0, "value"), 0.0),
        (("super_weights", 1, "element"), 485),
        (("source",), None),
        (("source",), "report"),
        (("report",), "0" * 64),
        (("super_weights",), []),
    ],
)
def test_fields_that_do_not_fit_each_other(manifest, path, value):
    document = manifest.to_dict()
    place = document
    for step in path[:-1]:
        place = place[step]
    assert place[path[-1]] != value
    place[path[-1]] = value
    with pytest.raises(InvalidInput):
        parse(resealed(document))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x", "a/../b", "a\\b", "./a", "a\nb"])
def test_no_file_name_leads_out_of_the_folder(manifest, name):
    document = manifest.to_dict()
    document["others"][0]["name"] = name
    with pytest.raises(InvalidInput, match=r"others\[0\].name"):
        parse(resealed(document))


def test_the_seal(manifest, tmp_path):
    path = tmp_path / "m.guard.json"
    manifest.save(path, KEY)
    assert Manifest.load(path, KEY) == manifest
    with pytest.raises(InvalidInput, match="sealed: give the key"):
        Manifest.load(path)
    with pytest.raises(InvalidInput, match="not that of this key") as error:
        Manifest.load(path, b"another key of some length")
    assert "another key of" not in str(error.value)
    document = json.loads(path.read_text())
    forged = manifest.to_dict() | {"hmac": document["hmac"][::-1]}
    path.write_text(json.dumps(forged))
    with pytest.raises(InvalidInput, match="not that of this key"):
        Manifest.load(path, KEY)
    manifest.save(path)
    assert Manifest.load(path) == manifest
    with pytest.raises(InvalidInput, match="not sealed"):
        Manifest.load(path, KEY)
    with pytest.raises(InvalidInput, match="at least 16"):
        manifest.save(path, b"short")


LAYOUTS = {
    "fused": ({"model.layers.0.mlp.experts.down_proj": (4, 8, 24)}, lambda e, r, c: (e, r, c)),
    "fused, transposed": (
        {"model.layers.0.mlp.experts.down_proj": (4, 24, 8)}, lambda e, r, c: (e, c, r)
    ),
    "stacked": ({"model.layers.0.mlp.experts.w2": (96, 8)}, lambda e, r, c: (e * 24 + c, r)),
    "split": (
        {f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight": (8, 24) for e in range(4)},
        lambda e, r, c: (r, c),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts(tmp_path, layout):
    shapes, index = LAYOUTS[layout]
    held = {name: torch.randn(shape) for name, shape in shapes.items()}
    source = write(tmp_path / "m", held)
    site = ("model.layers.0.mlp.experts", 2)
    weight = create(source, Coordinates.of({site: [[5, 17]]}, {site: (8, 24)})).super_weights[0]
    if layout == "split":
        assert weight.tensor.endswith("experts.2.w2.weight")
    assert (weight.expert, weight.row, weight.column) == (2, 5, 17)
    assert weight.value == held[weight.tensor][index(2, 5, 17)].item()


def test_a_conv1d_is_stored_transposed(tmp_path):
    held = {"h.0.mlp.c_proj.weight": torch.randn(24, 8), "h.0.mlp.c_proj.bias": torch.randn(8)}
    source = write(tmp_path / "m", held)
    site = ("transformer.h.0.mlp.c_proj", None)
    weight = create(source, Coordinates.of({site: [[5, 17]]}, {site: (8, 24)})).super_weights[0]
    assert weight.value == held["h.0.mlp.c_proj.weight"][17, 5].item()


def test_super_weights_of_a_report_and_of_the_catalogue(tmp_path):
    document = fake_report.found()
    report = tmp_path / "report.json"
    ScanReport(document).save(report)
    zeros = torch.zeros(4096, 11008, dtype=torch.int8)
    held = {f"{NAME.format(layer)}.weight": zeros.clone() for layer in (2, 4)}
    source = write(tmp_path / "m", held)
    found = create(source, report)
    assert [(w.module, w.row, w.column) for w in found.super_weights] == sorted(
        (c["module"], c["row"], c["column"]) for c in ScanReport(document).super_weights
    )
    assert found.source == "report"
    assert found.report == hashlib.sha256(report.read_bytes()).hexdigest()
    name = "model.layers.11.mlp.down_proj.weight"
    small = write(tmp_path / "small", {name: torch.randn(576, 1536)})
    found = create(small, "catalogue:SmolLM2-135M-Instruct")
    assert [(w.row, w.column) for w in found.super_weights] == [(507, 1229), (507, 1487)]
    with pytest.raises(InvalidInput, match="SmolLM2-135M"):
        create(source, "catalogue:nothing of the kind")
    with pytest.raises(InvalidInput, match="has no"):
        create(small, coordinates())


@pytest.mark.parametrize("hash", ["xxh3_64", "xxh3_128", "sha256"])
def test_every_hash_finds_damage(model, hash):
    manifest = create(model, chunk=CHUNK, hash=hash)
    assert verify(model, manifest).status == "intact"
    flip_in(model, WEIGHT, 0, bit=0)
    assert verify(model, manifest).status == "damaged"


@pytest.mark.parametrize("given", [{"chunk": 0}, {"chunk": 100}, {"hash": "md5"}, {"threads": 0}])
def test_wrong_arguments(model, given):
    with pytest.raises(InvalidInput):
        create(model, **given)
