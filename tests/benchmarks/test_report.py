"""The pages: everything comes from the records, nothing is claimed without one."""

from __future__ import annotations

import pytest

from benchmarks import records, report
from benchmarks.book import Book
from benchmarks.tables import NOT_MEASURED, seconds, slower
from benchmarks.targets import TARGETS

from .test_records import HEADER, NO_SPEED, RESULT

CPU = {"type": "cpu", "name": "Some CPU, 2 cores"}
H100 = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}


def header(run="a1", device=CPU, day=1, **fields):
    ceilings = {"read": 2e10, "copy": 3e10, "gemm": {"float32": 1e11, "bfloat16": 2e11}}
    return HEADER | {
        "run": run,
        "time": f"2026-12-{day:02}T10:00:00+00:00",
        "device": device,
        "versions": {"torch": "2.13.0"},
        "ceilings": ceilings,
        **fields,
    }


def results(run="a1", case="case A", *providers, op="column_absmax", shape=(64, 48), **fields):
    """Results of one case; a provider is (name, role, seconds) or (name, role, status)."""
    found = []
    sizes = dict(zip(("tokens", "columns", "rows"), shape))
    for name, role, value in providers:
        status = value if isinstance(value, str) else "ok"
        speed = NO_SPEED | {"status": status, "reason": f"{status} because"}
        if status == "ok":
            speed = {"status": "ok", "median": value, "p20": value * 0.9, "p80": value * 1.1}
        given = {"run": run, "op": op, "case": case, "shape": sizes, "provider": name}
        found.append(RESULT | given | {"role": role} | speed | fields)
    return found


@pytest.fixture
def place(tmp_path):
    """A folder for records, a README with the markers, and a function that runs the report."""
    folder = tmp_path / "results"
    folder.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\nkept\n\n{report.BEGIN}\n{report.END}\n\nkept too\n")

    class Place:
        path = folder / "machine.jsonl"
        readme_path = readme
        output = tmp_path / "RESULTS.md"

        def run(self, *options):
            given = ["--results", str(folder), "--readme", str(readme), "--output"]
            return report.main([*given, str(self.output), *options])

        def pages(self):
            assert self.run() == 0
            return readme.read_text(), self.output.read_text()

    return Place()


def line_of(page, text):
    (line,) = [line for line in page.splitlines() if text in line and line.startswith("|")]
    return line


def test_without_records_every_target_is_not_measured(place):
    readme, page = place.pages()
    for target in TARGETS:
        assert line_of(readme, f"| {target.work} |").endswith(f"| {NOT_MEASURED} |")
    assert readme.startswith("# Title\n\nkept\n") and readme.endswith("kept too\n")
    assert "ms" not in readme and "(predicted)" in page


def test_a_measured_case_with_its_ratios(place):
    rows = results(
        "a1", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", 1.25e-3),
        ("abs().max(0)", "eager", 5e-3), ("torch.compile", "compile", 2.5e-3),
    )  # fmt: skip
    records.write(place.path, header(), rows)
    readme, page = place.pages()
    line = line_of(page, "| case A |")
    for text in ("1 ms (900 us..1.1 ms)", "1.25 ms", "5 ms", "x1.250", "0.50 read", "0 / 0"):
        assert text in line
    headline = line_of(readme, "case A")
    assert "x1.250" in headline and "x0.500 (torch.compile)" in headline
    assert "In none of 1 cases is another way faster" in readme
    assert (place.path.parent / "some-cpu-2-cores.svg").exists()
    assert "some-cpu-2-cores.svg" in readme


def test_what_is_wrong_or_failed_has_a_reason_and_no_speed(place):
    rows = results(
        "a1", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", "wrong"),
        ("swkernels (cuda)", "ours", "failed"), ("a peer", "peer", "unavailable"),
        ("abs().max(0)", "eager", 5e-3),
    )  # fmt: skip
    records.write(place.path, header(), rows)
    readme, page = place.pages()
    line = line_of(page, "| case A |")
    assert "**wrong**" in line and "**failed**" in line
    assert "- **wrong**: swkernels, case A: wrong because" in page
    assert "- **failed**: swkernels (cuda), case A: failed because" in page
    assert "- a peer: not measured, unavailable because" in page
    assert "case A" not in readme  # nothing of ours was measured


def test_every_case_in_which_another_way_is_faster_is_listed(place):
    rows = []
    for number, ours in enumerate((0.5e-3, 2e-3, 3e-3, 4e-3, 5e-3)):
        rows += results(
            "a1", f"case {number}", ("read", "bare", 1e-4), ("swkernels", "ours", ours),
            ("eager way", "eager", 9e-3), ("the peer", "peer", 1e-3),
        )  # fmt: skip
    records.write(place.path, header(), rows)
    readme, page = place.pages()
    listed = page.partition("### Where another way is faster")[2].partition("\n## ")[0]
    assert "4 of 5 cases" in listed
    cases = [line.split("|")[2].strip() for line in listed.splitlines() if "case " in line]
    assert [case for case in cases if case != "case"] == ["case 4", "case 3", "case 2", "case 1"]
    assert "the peer: 1 ms | x5.000" in listed
    assert "In 4 of 5 cases another way" in readme and "x5.00 of the peer" in readme
    assert [e.case for e in slower(Book(place.path.parent).entries())] == cases[1:]


def test_the_newest_run_of_a_case_counts_and_a_skip_replaces_nothing(place):
    old = results("a1", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", 7e-3))
    new = results("b2", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", 2e-3))
    skip = results("c3", "case A", (None, None, "skipped"))
    skip += results("c3", "case B", (None, None, "skipped"))
    records.write(place.path, header("b2", day=2), new)
    records.write(place.path, header("a1", day=1), old)
    records.write(place.path, header("c3", day=3), skip)
    _, page = place.pages()
    assert "x2.000" in line_of(page, "| case A |") and "7 ms" not in page
    assert "1 cases: skipped because" in page and "- column_absmax: case B" in page


def test_ratios_are_never_formed_across_runs_or_machines(place):
    records.write(place.path, header(), results("a1", "case A", ("read", "bare", 1e-3)))
    gpu = results("g1", "case A", ("swkernels", "ours", 1e-4))
    records.write(place.path.with_name("gpu.jsonl"), header("g1", H100), gpu)
    _, page = place.pages()
    assert "x0.1" not in page and page.count("## Some CPU") == 1 and "## NVIDIA H100" in page


def test_a_dry_run_is_on_no_page(place):
    rows = results("a1", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", 2e-3))
    records.write(place.path, header(dry=True), rows)
    readme, page = place.pages()
    assert "case A" not in readme + page


def test_targets_are_held_against_the_right_machine_and_shape(place):
    shape = (4096, 14336, 4096)
    for run, device, ours in (("a1", CPU, 3e-3), ("g1", H100, 1.05e-3)):
        rows = results(
            run, "down", ("F.linear", "bare", 1e-3), ("swkernels", "ours", ours),
            op="linear_absmax", shape=shape, dtype="bfloat16",
        )  # fmt: skip
        records.write(place.path.with_name(f"{run}.jsonl"), header(run, device), rows)
    readme, _ = place.pages()
    line = line_of(readme, "Llama-3-8B down_proj, 4096 tokens, bfloat16 | H100 | at most 1.02")
    assert line.endswith("| 1.050 **missed** (NVIDIA H100 80GB HBM3) |")


def test_of_two_packed_weights_the_one_named_is_held_against_the_target(place):
    shape = {"rows": 4096, "columns": 14336, "block": 64}
    rows = []
    for code, ours in (("nf4", 0.01), ("int4", 0.04)):
        rows += results(
            "a1", code, ("read", "bare", 8e-3), ("swkernels", "ours", ours),
            ("bitsandbytes", "peer", 1.3), op="block_quantize",
        )  # fmt: skip
        for row in rows[-3:]:
            row |= {"shape": shape, "projection": f"down_proj, {code}, blocks of 64"}
    records.write(place.path, header(), rows)
    readme, _ = place.pages()
    assert "| 130.000 (Some CPU, 2 cores) |" in line_of(readme, "to NF4, times faster")
    assert "| 0.200 **missed** (Some CPU, 2 cores) |" in line_of(readme, "to int4, reading")


def test_a_model_that_generates_has_its_tokens_a_second_and_its_weights(place):
    rows = results(
        "a1", "generation", ("bfloat16 model", "bare", 0.5), ("swkernels", "ours", 0.25),
        op="quant_generation", shape=(32, 48), dtype="bfloat16",
    )  # fmt: skip
    for row, size in zip(rows, (270e6, 81e6)):
        row["weights"] = int(size)
    records.write(place.path, header(), rows)
    readme, page = place.pages()
    assert "| generation | swkernels | 128 | 81 MB |" in page
    assert "| 2.000 (Some CPU, 2 cores) |" in line_of(readme, "SmolLM2 in int4, greedy")
    assert "| 0.300 (Some CPU, 2 cores) |" in line_of(readme, "the same model, bytes")


def test_a_training_step_has_its_memory_and_is_held_against_that_of_lora(place):
    rows = results(
        "a1", "step", ("forward", "bare", 6.0), ("swkernels", "ours", 6.6),
        ("PEFT LoRA, r = 8", "peer", 6.1), op="sparse_training", dtype="float32",
    )  # fmt: skip
    for row, size in zip(rows, (None, 210e6, 200e6)):
        row["step_memory"] = size and int(size)
    records.write(place.path, header(), rows)
    readme, page = place.pages()
    assert "| step | swkernels | 210 MB |" in page and "| step | forward |" not in page
    line = line_of(readme, "peak memory of a step with k = 4096")
    assert line.endswith("| 1.050 **missed** (Some CPU, 2 cores) |")


def test_a_share_of_bandwidth_is_that_of_the_read_beside_it(place):
    rows = results(
        "a1", "rows", ("read", "bare", 1e-3), ("swkernels", "ours", 2e-3), shape=(8192, 2048)
    )
    records.write(place.path, header(), rows)
    readme, _ = place.pages()
    line = line_of(readme, "share of the read bandwidth")
    assert line.endswith("| 0.500 **missed** (Some CPU, 2 cores) |")


def test_a_share_of_copy_bandwidth_is_computed_from_the_ceilings_of_the_run(place):
    size, copy = 16384 * 14336 * 2, header()["ceilings"]["copy"]
    rows = results(
        "a1", "rows", ("swkernels", "ours", size / copy / 0.9), shape=(16384, 14336),
        dtype="bfloat16", bytes=size,
    )  # fmt: skip
    records.write(place.path, header(device=H100), rows)
    readme, _ = place.pages()
    line = line_of(readme, "share of the copy bandwidth")
    assert line.endswith("| 0.900 (NVIDIA H100 80GB HBM3) |")


def test_check_passes_after_a_write_and_fails_when_anything_changes(place, capsys):
    rows = results(
        "a1", "case A", ("read", "bare", 1e-3), ("swkernels", "ours", 2e-3),
        ("abs().max(0)", "eager", 5e-3),
    )  # fmt: skip
    records.write(place.path, header(), rows)
    assert place.run() == 0
    assert place.run("--check") == 0
    text = place.readme_path.read_text()
    place.readme_path.write_text(text.replace("x2.000", "x0.900"))
    assert place.run("--check") == 1
    assert "x0.900" in capsys.readouterr().out
    place.readme_path.write_text(text)
    page = place.output.read_text()
    place.output.write_text(page + "more\n")
    assert place.run("--check") == 1
    place.output.write_text(page)
    rows[1]["median"] = 3e-3
    records.write(place.path, header(), rows)
    assert place.run("--check") == 1
    assert place.run() == 0 and place.run("--check") == 0
    (place.path.parent / "some-cpu-2-cores.svg").unlink()
    assert place.run("--check") == 1


def test_what_is_drawn_is_the_same_every_time(place):
    rows = results("a1", "case A", ("swkernels", "ours", 2e-3), ("abs().max(0)", "eager", 5e-3))
    records.write(place.path, header(), rows)
    place.run()
    picture = place.path.parent / "some-cpu-2-cores.svg"
    first = picture.read_bytes()
    place.run()
    assert picture.read_bytes() == first


def test_a_broken_record_or_a_readme_without_markers_is_named(place, capsys):
    place.path.write_text("nonsense\n")
    assert place.run("--check") == 2
    assert "machine.jsonl, line 1" in capsys.readouterr().err
    place.path.unlink()
    place.readme_path.write_text("# no markers\n")
    assert place.run() == 2
    assert "must have one section" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (1e-3, "1 ms"), (4.2e-5, "42 us"), (3e-7, "0.3 us")],
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_the_pages_of_this_repository_are_those_of_its_records():
    assert report.main(["--check"]) == 0
