"""What a run leaves behind: a table, the same as JSON, and one archive."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from benchmarks import records

TEXT, JSON, ARCHIVE = "summary.txt", "summary.json", "gpu-run.tar.gz"
_AUTOMATIC = "swkernels"  # the provider that takes what the tuning record says


def compared(folder: Path) -> list[dict]:
    """A row for each case of the last run in a folder of records: our automatic choice beside
    the bare operation. ``ratio`` is our time over the bare one's, None where one is missing."""
    runs = records.read(folder)
    results = runs[-1].results if runs else []
    bare = {(r["op"], r["case"]): r["median"] for r in results if r["role"] == "bare"}
    rows = []
    for result in results:
        if result["provider"] == _AUTOMATIC:
            row = {name: result[name] for name in ("op", "case", "status", "reason", "share")}
            ours, theirs = result["median"], bare.get((result["op"], result["case"]))
            ratio = ours / theirs if ours and theirs else None
            rows.append(row | {"ours": ours, "bare": theirs, "ratio": ratio})
    return rows


def write(out: Path, content: dict) -> str:
    """Write the summary in both forms, and return its text."""
    (out / JSON).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = _text(content)
    (out / TEXT).write_text(text, encoding="utf-8")
    return text


def _text(content: dict) -> str:
    lines = []
    if content["results"]:
        if content["dry"]:
            lines.append("A dry run: the figures below are of tiny sizes and say nothing.")
        lines.append(f"{'operation':14} {'case':54} {'ours/bare':>9} {'share':>6}")
        for row in content["results"]:
            ratio = f"{row['ratio']:9.3f}" if row["ratio"] else f"{'-':>9}"
            share = f"{row['share']:6.2f}" if row["share"] else f" {row['status']}"
            lines.append(f"{row['op']:14} {row['case'][:54]:54} {ratio} {share}")
        lines.append("")
    lines.append(f"{'step':12} {'outcome':11} {'seconds':>7}  note")
    for step in content["steps"]:
        head = f"{step['name']:12} {step['status']:11} {step['seconds']:7.1f}  "
        lines.append((head + step["note"]).rstrip())
        lines += [
            f"    {name}: {verdict}"
            for name, verdict in step["parts"].items()
            if step["status"] != "ok" or verdict.startswith("skipped")
        ]
    lines.append(f"{content['seconds']:.0f} s in all{', a dry run' if content['dry'] else ''}")
    return "\n".join(lines) + "\n"


def pack(out: Path) -> None:
    """Put everything into the archive, and remove the logs, which are then in there."""
    with tarfile.open(out / ARCHIVE, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.name != ARCHIVE:
                archive.add(path, arcname=f"gpu-run/{path.name}")
    shutil.rmtree(out / "logs", ignore_errors=True)
