"""Write the README's performance section and RESULTS.md from the records, or check them.

python -m benchmarks.report            # write
python -m benchmarks.report --check    # exit with 1 if a page and the records differ
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import quality, records, tables
from benchmarks.book import Book
from benchmarks.figures import draw, draw_quality
from swkernels.errors import InvalidInput, SwkernelsError

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- performance: written by python -m benchmarks.report -->"
END = "<!-- /performance -->"
_LINES_SHOWN = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except SwkernelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    book = Book(options.results)
    studies = quality.read_all(options.results)

    def plot(path: Path, draw_to: Callable[[Path], bool]) -> str | None:
        """Draw a plot, or look for it; its path as the README has it, None where there is none."""
        there = path.exists() if options.check else draw_to(path)
        return Path(os.path.relpath(path, options.readme.parent)).as_posix() if there else None

    figures = {
        machine: plot(
            options.results / f"{records.slug(machine)}.svg",
            partial(draw, list(book.entries(machine)), machine),
        )
        for machine in book.machines
    }
    plots = {
        plot(path.with_suffix(".svg"), partial(draw_quality, study)): study
        for path, study in studies.items()
    }
    figures = {machine: path for machine, path in figures.items() if path}
    plots = {path: study for path, study in plots.items() if path}
    section = tables.readme_section(book, figures, plots)
    pages = {
        options.readme: _with_section(options.readme, section),
        options.output: tables.results_page(book, studies.values()),
    }
    if options.check:
        return _check(pages)
    for path, text in pages.items():
        write_text(path, text)
        print(path)
    return 0


def _with_section(readme: Path, section: str) -> str:
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    if len(pattern.findall(text)) != 1:
        raise InvalidInput(f"{readme} must have one section between {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", text)


def _check(pages: dict[Path, str]) -> int:
    status = 0
    for path, expected in pages.items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == expected:
            continue
        status = 1
        lines = list(
            difflib.unified_diff(
                found.splitlines(),
                expected.splitlines(),
                f"{path}",
                "from the records",
                lineterm="",
            )
        )
        print("\n".join(lines[:_LINES_SHOWN]))
        print(f"{path} differs from the records: run python -m benchmarks.report")
    return status


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


if __name__ == "__main__":
    sys.exit(main())
