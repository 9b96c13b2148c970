"""The page docs/benchmarks.md: its generated part, from the measurements."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.parts import Part, all_parts
from benchmarks.speed.sections import CLAIMS, OURS, SECTIONS, Results, table
from benchmarks.speed.store import Measurement, Store

BEGIN = "<!-- What stands from here on is written by `make bench`. -->"
END = "<!-- What `make bench` writes ends here. -->"
BUSY = 0.05
"""Share of the machine taken by others from which a measurement is marked."""


def page_tables(store: Store) -> str:
    """All that is written between the markers."""
    if not store.measurements:
        return "Nothing has been measured yet."
    parts = [*all_parts("full", Path()).values()]
    text = [machine_line(store), "## Bars", bars_table(store), part_tables(store, parts)]
    return "\n\n".join(text)


def part_tables(store: Store, parts: Sequence[Part]) -> str:
    """A section for each part that was measured."""
    sections = []
    for part in parts:
        rows = store.of(part.name)
        results = Results(part, rows)
        if rows and (OURS in results.sides or not any(s.name == OURS for s in part.sides)):
            sections += [f"## {part.title}", _how(part, rows), SECTIONS[part.kind](results)]
    return "\n\n".join(sections)


def bars_table(store: Store) -> str:
    """A row for each bar."""
    claims = [
        claim
        for part in all_parts("full", Path()).values()
        if (rows := store.of(part.name))
        for claim in CLAIMS[part.kind](part, Results(part, rows))
    ]
    head = ["part", "figure", "measured", "bar", ""]
    return table(head, [[*claim] for claim in claims], texts=len(head))


def replace(page: str, block: str) -> str:
    """The page with what is between its markers replaced; the rest is written by hand.

    Raises:
        SystemExit: the page has one of the markers only.
    """
    if BEGIN not in page and END not in page:
        page = (
            f"# Benchmarks\n\n{BEGIN}\n{END}\n" if not page.strip() else f"{page}\n{BEGIN}\n{END}\n"
        )
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the lines {BEGIN!r} and {END!r}, in this order; got only one")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def machine_line(store: Store) -> str:
    """Where and when it was measured."""
    machine = store.machine
    commits = " ".join(sorted({row.commit for row in store.measurements if row.commit}))
    times = sorted(row.at for row in store.measurements)
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}, {packages}."
        f"{f' Commit {commits}.' if commits else ''} {times[0]} to {times[-1]} UTC."
    )


def _how(part: Part, rows: Sequence[Measurement]) -> str:
    turns = len({row.turn for row in rows})
    text = f"Part `{part.name}`; {turns} {'turn' if turns == 1 else 'turns'}"
    text += ": medians, with the lowest and the highest in brackets." if turns > 1 else "."
    busy = [
        f"{row.side}, turn {row.turn + 1} ({row.others:.0%})" for row in rows if row.others > BUSY
    ]
    commits = sorted({row.commit for row in rows})
    if len(commits) > 1:
        text += f" Of several commits: {' '.join(commits)}."
    if busy:
        text += f" Others took part of the machine during: {'; '.join(busy)}."
    return text
