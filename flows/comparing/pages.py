"""A comparison as people read it: on the terminal, and as a folder with a page and a figure."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.comparing.metric_rows import Estimate, MetricRow
from flows.comparing.runs import Comparison, Values
from flows.markdown import literal, plain, table_head, table_row
from plumbline.errors import MachineError
from plumbline.project import Project

SHOWN_SAMPLES = 3
SAMPLES_OF_THE_REPORT = 40
LABEL_WIDTH, VALUE_WIDTH = 34, 24
"""Columns of the terminal that a metric's label and a value with its interval take."""
LONG = re.compile(r"[0-9a-f]{31,}(\.dir)?")
"""A digest; its first characters tell it from others."""
ARROWS = {"higher": "↑", "lower": "↓", None: ""}
HOW_TO_READ = (
    "[95% interval]; ↑ higher is better, ↓ lower is better, neither arrow: no direction is. "
    "{best}: the best value; where intervals overlap, that may be chance."
)
HEADS = ("run", "id", "commit", "data.dvc")


def report_folder(project: Project, to: Path | None) -> Path:
    """Where the report goes: `to`, or a new folder among the reports.

    Raises:
        MachineError: `to` is there already, or can't be made.
    """
    if to is None:
        name = f"compare-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        return project.reports / name
    folder = to.absolute()
    if os.path.lexists(folder):
        raise MachineError(f"--to {to}: expected a folder that is not there yet; name another")
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        raise MachineError(f"--to {to}: expected a place in a folder that can be written to")
    return folder


def write_report(found: Comparison, figure: Figure, folder: Path) -> None:
    """Write report.md, comparison.json and frontier.png, all at once or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        figure.savefig(aside / "frontier.png")
        (aside / "comparison.json").write_text(found.model_dump_json(indent=1) + "\n", "utf-8")
        (aside / "report.md").write_text(markdown(found), "utf-8")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


# The terminal.


def show(console: Console, found: Comparison) -> None:
    """Print runs, notes, metrics, what differs, and a few samples."""
    console.print(_runs(found))
    for note in found.notes:
        console.print(plain(f"note: {note}"), style="yellow", soft_wrap=True)
    if found.metrics:
        console.print()
        console.print(_metrics(found, console.width))
        console.print(Text(HOW_TO_READ.format(best="*"), "dim"))
    if len(found.runs) > 1:
        _show_differences(console, found)
    if found.samples:
        console.print()
        console.print(_samples(found))


def _runs(found: Comparison) -> Table:
    table = Table("", *HEADS, box=None, pad_edge=False)
    for mark, said in _heads(found).items():
        table.add_row(Text(mark, "bold"), *map(plain, said))
    return table


def _metrics(found: Comparison, width: int) -> Table:
    table = Table("metric", box=None, pad_edge=False)
    for mark in found.runs:
        table.add_column(mark, justify="right")
    between = " " if width >= LABEL_WIDTH + VALUE_WIDTH * len(found.runs) else "\n"
    for row in found.metrics.values():
        cells = []
        for mark, estimate in row.values.items():
            value, interval = _numbers(estimate, row.digits)
            best = mark in row.best
            number = (f"*{value}", "bold green") if best else (value, "")
            cells.append(Text.assemble(number, (f"{between}{interval}".rstrip(), "dim")))
        table.add_row(_label(row), *cells)
    return table


def _show_differences(console: Console, found: Comparison) -> None:
    parts = {"param": found.params, "data": found.data, "code and machine": found.code}
    for title, differences in parts.items():
        if differences:
            console.print()
            table = Table(title, *found.runs, box=None, pad_edge=False)
            for name, values in differences.items():
                table.add_row(plain(name), *(plain(text) for text in _cells(values)))
            console.print(table)
    for line in _in_common(found):
        console.print(Text(line, "dim"))


def _samples(found: Comparison) -> Table:
    scores = _scores(found)
    table = Table("", *scores, "answer", title="The same held-out prompts", title_justify="left")
    for sample in found.samples[:SHOWN_SAMPLES]:
        table.add_row("", *("" for _ in scores), Text.assemble(plain(sample.prompt), style="bold"))
        for mark, answer in sample.answers.items():
            numbers = (_number(answer.scores.get(name)) for name in scores)
            table.add_row(Text(mark, "bold"), *numbers, plain(answer.text))
        table.add_section()
    return table


# The page.


def markdown(found: Comparison) -> str:
    """The comparison on a page; what models and users wrote stands there as it is."""
    return "\n".join(_page(found)) + "\n"


def _page(found: Comparison) -> Iterator[str]:
    yield from (f"# {_count(found)} compared", "")
    yield from table_head("", *HEADS)
    for mark, said in _heads(found).items():
        yield table_row(mark, *map(literal, said))
    if found.notes:
        yield from ("", *(f"- {literal(note)}" for note in found.notes))
    if found.metrics:
        yield from ("", "## Metrics", "", *table_head("metric", *found.runs, right=len(found.runs)))
        for row in found.metrics.values():
            yield table_row(_label(row), *(_estimate(row, mark) for mark in found.runs))
        yield from ("", literal(HOW_TO_READ.format(best="Bold")))
    yield from ("", "## Reward against KL", "", "![reward against KL](frontier.png)")
    if len(found.runs) > 1:
        yield from ("", "## What differs")
        parts = {"param": found.params, "data": found.data, "code and machine": found.code}
        for title, differences in parts.items():
            if differences:
                yield from ("", *table_head(title, *found.runs))
                for name, values in differences.items():
                    yield table_row(literal(name), *map(literal, _cells(values)))
        for line in _in_common(found):
            yield from ("", literal(line))
    if found.samples:
        yield from ("", "## The same held-out prompts")
        yield from _answers(found)


def _answers(found: Comparison) -> Iterator[str]:
    scores = _scores(found)
    for sample in found.samples[:SAMPLES_OF_THE_REPORT]:
        yield from ("", f"**{literal(sample.prompt)}**", "")
        yield from table_head("", *scores, "answer")
        for mark, answer in sample.answers.items():
            numbers = (_number(answer.scores.get(name)) for name in scores)
            yield table_row(mark, *numbers, literal(answer.text))


def _estimate(row: MetricRow, mark: str) -> str:
    value, interval = _numbers(row.values[mark], row.digits)
    shown = f"**{value}**" if mark in row.best else value
    return f"{shown} {literal(interval)}".rstrip()


# Both.


def _count(found: Comparison) -> str:
    return f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''}"


def _heads(found: Comparison) -> dict[str, list[str]]:
    """What is said of each run, in the columns of its table."""
    return {
        mark: [*map(_short, (run.name, run.run_id, run.commit, run.data_rev))]
        for mark, run in found.runs.items()
    }


def _label(row: MetricRow) -> str:
    return f"{row.label} {ARROWS[row.better]}".rstrip()


def _numbers(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """A value and its interval, as far as they are there."""
    if estimate is None:
        return "–", ""
    known = estimate.low is not None and estimate.high is not None
    ends = (_number(end, digits) for end in (estimate.low, estimate.high))
    return _number(estimate.value, digits), f"[{', '.join(ends)}]" if known else ""


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _short(text: str | None) -> str:
    """A text, or the beginning of a digest."""
    if text is None:
        return "–"
    return text[:12] if LONG.fullmatch(text) else text


def _cells(values: Values) -> list[str]:
    return [_short(value) for value in values.values()]


def _scores(found: Comparison) -> list[str]:
    """The scores that any answer has."""
    answers = [answer for sample in found.samples for answer in sample.answers.values()]
    return [*dict.fromkeys(name for answer in answers for name in answer.scores)]


def _in_common(found: Comparison) -> list[str]:
    parts = {"params": found.params, "data": found.data, "code and machine": found.code}
    same = [name for name, differences in parts.items() if not differences]
    lines = [f"The same in all runs: {', '.join(same)}."] if same else []
    steps = ", ".join(found.shared)
    return [*lines, *([f"Steps with the very same result in all runs: {steps}."] if steps else [])]
