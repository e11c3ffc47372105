"""What every result of this room can do: become a document, a table of rows, a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from swkernels.detect.report import encode
from swkernels.errors import InvalidInput
from swkernels.files import write_atomically
from swkernels.train.figure import render

_FIGURES = (".png", ".svg", ".pdf")


class Result:
    """Base of the typed results.

    A subclass sets ``schema``, and defines ``to_dict`` (plain values; infinities and NaN may stay
    floats), ``rows`` (one flat dictionary for each thing that was measured) and ``_draw``.
    """

    schema: str
    height: float = 4.0  # of the figure, in inches; the width is 9.2

    def to_dict(self) -> dict:
        """The whole result as plain values, with ``schema`` first."""
        raise NotImplementedError

    def rows(self) -> list[dict]:
        """One flat dictionary for each thing that was measured."""
        raise NotImplementedError

    def _draw(self, figure) -> None:
        """Fill a matplotlib figure."""
        raise NotImplementedError

    def to_dataframe(self):
        """Return ``rows()`` as a pandas DataFrame.

        Raises:
            InvalidInput: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InvalidInput("a DataFrame needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as JSON, aside and then renamed; infinities and NaN as strings.

        Raises:
            InvalidInput: the folder cannot be written.
        """
        content = json.dumps(encode(self.to_dict()), indent=1, allow_nan=False) + "\n"
        write_atomically(Path(path), content.encode())

    def plot(self, path: str | Path) -> None:
        """Draw the result to a .png, .svg or .pdf file, by the suffix. Needs no display.

        Raises:
            InvalidInput: another suffix, or a folder that cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _FIGURES:
            raise InvalidInput(f"expected a file that ends in {', '.join(_FIGURES)}, got {path}")
        write_atomically(path, render(self._draw, suffix[1:], self.height))


Progress = Callable[[str, int, int], None]  # (stage, done, total)


def silent(stage: str, done: int, total: int) -> None:
    """A ``Progress`` that shows nothing."""
