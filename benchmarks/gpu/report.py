"""The report of `make gpu` as text: one table of stages for the terminal, and report.md with each stage's own table."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import predicted

NOT_MEASURED = "from data sheets and assumptions, before anything had run on a GPU"
BAD = ("failed", "timed out", "interrupted")
MIB = 2**20


def line(row: dict[str, Any]) -> str:
    """One stage in one line: outcome, seconds, finding or reason."""
    took = f" after {row['seconds']:.1f} s" if row["seconds"] else ""
    return f"{row['outcome']}{took}: {_what(row)}"


def _what(row: dict[str, Any]) -> str:
    return "; ".join(part for part in (row["reason"], row["finding"]) if part) or "-"


def table(document: dict[str, Any]) -> str:
    """The stages as a table for the terminal, the findings not cut."""
    rows = [("stage", "outcome", "s", "finding")]
    rows += [(r["name"], r["outcome"], f"{r['seconds']:.1f}", _what(r)) for r in document["stages"]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
    return "\n".join([lines[0], "-" * 100, *lines[1:], _summary(document)])


def _summary(document: dict[str, Any]) -> str:
    counts = [row["outcome"] for row in document["stages"]]
    parts = [f"{counts.count(o)} {o}" for o in ("ok", *BAD, "skipped") if o in counts]
    return f"{', '.join(parts)}; {document['spent_s']:.0f} s of {document['budget_s']:.0f}"


def markdown(document: dict[str, Any]) -> str:
    """report.md: the table of stages, then what each measured."""
    card = document.get("card")
    title = f"{card['name']}, compute capability {card['capability']}" if card else "no GPU"
    lines = [f"# `make gpu`: {title}", ""]
    lines += [f"{document['date']}, commit {document['commit'] or 'unknown'}, {_summary(document)}.", ""]
    if document["dry_run"] or not card:
        lines += ["Nothing was measured; this is what would run.", ""]
        lines += ["```sh", *(shlex.join(_short(r["command"])) for r in document["stages"]), "```", ""]
    rows = [
        [r["name"], r["title"], r["outcome"], f"{r['seconds']:.1f}", f"{r['limit_s']:.0f}", _what(r)]
        for r in document["stages"]
    ]
    lines += _table(["stage", "what", "outcome", "s", "limit", "finding"], rows)
    for row in document["stages"]:
        if body := _body(row):
            lines += ["", f"## {row['title']}", "", *body]
            lines += _beside_predictions(row, card["name"] if card else "")
    if (document["dry_run"] or not card) and (rows := predicted.without_a_card()):
        lines += ["", "## Predicted", "", f"By benchmarks/cuda_model.py, {NOT_MEASURED}.", ""]
        lines += _table(["card", "a training step", "launches", "ms"], rows)
    return "\n".join(lines) + "\n"


def _body(row: dict[str, Any]) -> list[str]:
    """A stage's own table; what an ended stage has left may lack anything, and must not cost the report."""
    render = _RENDER.get(row["name"])
    if not row["result"] or not render:
        return []
    try:
        return render(row["result"])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        return [f"Its result is not whole ({type(error).__name__}: {error}); report.json has it."]


def _beside_predictions(row: dict[str, Any], device: str) -> list[str]:
    """What was measured beside what cuda_model predicted for this card, if it did."""
    try:
        rows = predicted.section(row, device)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return ["", f"No comparison with predictions ({type(error).__name__}: {error})."]
    if not rows:
        return []
    said = f"Predicted by benchmarks/cuda_model.py, {NOT_MEASURED}:"
    return ["", said, "", *_table(["", "measured ms", "predicted ms", "measured / predicted"], rows)]


def _short(command: Sequence[str]) -> list[str]:
    return ["python", *command[1:]]


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def cells(row: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [cells(headings), "|" + "---|" * len(headings), *(cells(row) for row in rows)]


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent; - for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - _exponent(value))
    return f"{value:.{decimals}f}"


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def _machine(result: dict[str, Any]) -> list[str]:
    card, rest = result.get("card") or {}, result.get("software", {})
    return _table(["", ""], [[key, value] for key, value in {**card, **rest}.items()])


def _build(result: dict[str, Any]) -> list[str]:
    return _table(["file", "seconds"], [[r["file"], number(r["seconds"])] for r in result["rows"]])


def _tests(result: dict[str, Any]) -> list[str]:
    lines = _table(
        ["file", "passed", "failed", "skipped", "not run"],
        [[r["file"], r["passed"], r["failed"], r["skipped"], r["not run"]] for r in result["rows"]],
    )
    failures = result.get("failures", [])
    return lines + ([""] + [f"- `{f['test']}`: {f['message']}" for f in failures] if failures else [])


def _operators(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for part in result["rows"]:
        ceilings = ", ".join(
            f"{name} {number(c['gflops_per_s'] / 1e3)} TFLOP/s"
            if c["flops"]
            else f"{name} {number(c['gbytes_per_s'] / 1e3)} TB/s"
            for name, c in part["ceilings"].items()
        )
        lines += ([""] if lines else []) + [f"**{part['numbers']}**; ceilings: {ceilings}", ""]
        names = list(dict.fromkeys(r["op"] for r in part["rows"]))
        shapes = list(dict.fromkeys(r["shape"] for r in part["rows"]))
        by = {(r["op"], r["shape"]): r for r in part["rows"]}
        lines += _table(
            ["time to floor (ms)", *shapes],
            [
                [
                    f"`{name}`",
                    *(
                        f"{r['time_to_floor']:.2f} ({number(r['median_ms'])})"
                        if (r := by.get((name, s)))
                        else "-"
                        for s in shapes
                    ),
                ]
                for name in names
            ],
        )
    return lines


def _steps(result: dict[str, Any]) -> list[str]:
    rows = []
    for r in result["rows"]:
        if "error" in r:
            rows.append([r["config"], r["impl"], "failed", r["error"], "", ""])
            continue
        speed, memory = r.get("speed_to_naive"), r.get("memory_to_naive")
        rows.append(
            [
                r["config"],
                r["impl"] + (f" ({r['note']})" if "note" in r else ""),
                number(r["median_ms"]),
                f"{speed:.2f}x" if speed else "-",
                f"{r['peak_bytes'] / MIB:.0f}" if r["peak_bytes"] is not None else "-",
                f"{memory:.2f}x" if memory else "-",
            ]
        )
    return _table(["step", "implementation", "ms", "speed to naive", "peak MiB", "peak to naive"], rows)


def _launchers(result: dict[str, Any]) -> list[str]:
    return _table(["tool", "outcome", "s"], [[r["tool"], r["outcome"], r["seconds"]] for r in result["rows"]])


def _kernelbench(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            r["problem"],
            number(r["published_eager_ms"]),
            number(r["published_compile_ms"]),
            number(r["naive_ms"]),
            number(r["effdense_ms"]),
            f"{r['naive_ms'] / r['effdense_ms']:.2f}x",
            f"{r['error']:.1e} ({r['naive_error']:.1e})",
        ]
        for r in result["rows"]
    ]
    headings = [
        "problem",
        "published eager ms",
        "published inductor ms",
        "naive ms",
        "effdense ms",
        "speed",
        "error (naive's)",
    ]
    return _table(headings, rows)


def _counters(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            r["kernel"],
            number(r["us"]),
            number(r["memory_gbytes_per_s"]),
            number(r["memory_percent"]),
            number(r["compute_percent"]),
            number(r["occupancy_percent"]),
            ", ".join(f"{s['reason']} {s['warps']:.2f}" for s in r["stalls"][:3]),
        ]
        for r in result["rows"]
    ]
    headings = [
        "kernel",
        "µs",
        "GB/s",
        "memory %",
        "compute %",
        "occupancy %",
        "stalls (warps of each issue)",
    ]
    return _table(headings, rows)


def _host(result: dict[str, Any]) -> list[str]:
    keys = ("host_ms", "device_ms", "step_ms", "kernels")
    rows = [[r["config"], r["impl"], *(number(r[k]) for k in keys)] for r in result["rows"]]
    return _table(["step", "implementation", "host ms", "device busy ms", "step ms", "kernels"], rows)


_RENDER: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "machine": _machine,
    "build": _build,
    "tests": _tests,
    "operators": _operators,
    "steps": _steps,
    "compile": _steps,
    "launchers": _launchers,
    "kernelbench": _kernelbench,
    "counters": _counters,
    "host": _host,
}
