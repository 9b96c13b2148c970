"""What a look at the data has found, in words: on the terminal and as a page in Prefect."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.watching.found import WORK_TREE, FileChange, Found
from plumbline.data.formats import Failure

SHOWN_FAILURES = 200
SHOWN_FILES = 200
COLOURS = {"run": "yellow", "cached": "green", "unknown": "cyan"}


def heading(found: Found) -> str:
    """The state in a word or two, as the name of a Prefect state."""
    return found.state.capitalize()


def sentence(found: Found) -> str:
    """What was found, in a sentence."""
    where = "data.dvc" if found.source == WORK_TREE else f"data.dvc of {found.source}"
    trained = f"the run {found.trained.run}" if found.trained else "no run yet"
    match found.state:
        case "unchanged":
            return f"{found.dataset} in {where} is what {trained} was trained on."
        case "superseded":
            return (
                f"{where} has not changed since it was last trained on; {trained} was trained on "
                "other data. With `again` it is announced all the same."
            )
        case "under way":
            return f"A run of {found.experiment} on {where} is under way."
        case "announced before":
            return (
                f"{where} differs from what {trained} was trained on, and that was announced "
                f"already (event {found.event}). With `again` it is announced once more."
            )
    kinds = [change.change for change in found.files]
    files = ", ".join(_count(kinds.count(kind), f"file {kind}") for kind in dict.fromkeys(kinds))
    told = " It was announced." if found.state == "announced" else ""
    since = f"from what {trained} was trained on" if found.trained else "since nothing was trained"
    return f"{where} differs {since}: in {found.dataset}, {files}.{told}"


def _count(number: int, what: str) -> str:
    noun, _, rest = what.partition(" ")
    return f"{number} {noun}{'' if number == 1 else 's'} {rest}".rstrip()


def artifact_key(experiment: str) -> str:
    """The key under which Prefect collects the pages of an experiment."""
    return "data-" + (re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-") or "watch")


# The page in Prefect.


def page(found: Found) -> str:
    """A change in Markdown: files, and what would run."""
    lines = [f"# {_text(found.experiment)}: the data has changed", "", _text(sentence(found)), ""]
    lines += [f"- revision: `{found.rev}`"]
    lines += [f"- trained on: `{found.trained.rev}`"] if found.trained else []
    lines += [f"- commit: `{found.commit}`"] if found.commit else []
    lines += ["", "| file | change | md5 before | md5 now | rows before | rows now |"]
    lines += ["|---|---|---|---|---:|---:|"]
    lines += [_row(*_cells(change)) for change in found.files[:SHOWN_FILES]]
    lines += _left_out(len(found.files) - SHOWN_FILES, "file")
    lines += ["", "| step | | because |", "|---|---|---|"]
    lines += [_row(name, step.action, step.because) for name, step in found.steps.items()]
    if found.set_aside:
        lines += ["", f"The run sets {_count(len(found.set_aside), 'row')} aside."]
    return "\n".join(lines) + "\n"


def invalid_page(experiment: str, ref: str, failures: Sequence[Failure]) -> str:
    """The rules that changed data breaks, in Markdown."""
    where = f"data.dvc of {ref}" if ref else "data.dvc"
    lines = [f"# {_text(experiment)}: the changed data is not valid", ""]
    lines += [
        f"{_count(len(failures), 'fault')} in the data of {_text(where)}; nothing was started.",
        "",
    ]
    lines += ["| file | row | field | reason | value |", "|---|---:|---|---|---|"]
    lines += [
        _row(f.file, "" if f.row is None else f.row, f.field or "", f.reason, f.value)
        for f in failures[:SHOWN_FAILURES]
    ]
    lines += _left_out(len(failures) - SHOWN_FAILURES, "fault")
    return "\n".join(lines) + "\n"


def _left_out(count: int, what: str) -> list[str]:
    return ["", f"… and {_count(count, what)} more."] if count > 0 else []


def _row(*cells: object) -> str:
    return "| " + " | ".join(_text(cell) for cell in cells) + " |"


def _text(value: object) -> str:
    """A text as it is: a row of the data must not become markup of the page."""
    shown = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", lambda found: f"&#{ord(found[0])};", shown)


def _cells(change: FileChange) -> list[str]:
    md5s = [md5[:12] if md5 else "–" for md5 in (change.old_md5, change.new_md5)]
    rows = [
        f"{count:,}" if count is not None else "–" for count in (change.old_rows, change.new_rows)
    ]
    return [change.path, change.change, *md5s, *rows]


# The terminal.


def show(console: Console, found: Found) -> None:
    """Print what was found: the files that differ, and what a run would do."""
    console.print(Text(sentence(found)), soft_wrap=True)
    if not found.files:
        return
    console.print(f"data.dvc: {found.rev}", highlight=False, soft_wrap=True)
    files = Table("file", "change", "md5", "now", "rows", "now", box=None, pad_edge=False)
    for change in found.files[:SHOWN_FILES]:
        files.add_row(*(Text(cell) for cell in _cells(change)))
    steps = Table("step", "action", "because", box=None, pad_edge=False)
    for name, step in found.steps.items():
        steps.add_row(name, Text(step.action, COLOURS[step.action]), Text(step.because))
    console.print()
    console.print(files)
    console.print()
    console.print(steps)
    if found.set_aside:
        console.print(f"The run sets {_count(len(found.set_aside), 'row')} aside.")
