"""What a promotion brought out: the value of its flow, and how it is shown."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.markdown import literal, plain, table_head, table_row
from flows.promotion.matching import Settled

Outcome = Literal["promoted", "refused", "nothing to do"]
SHOWN_SAMPLES = 4


class WinRate(BaseModel):
    """The challenger's win rate with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Estimate [low, high]."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Sample(BaseModel):
    """A held-out prompt with both answers and their scores."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    champion: str
    champion_score: float
    challenger: str
    challenger_score: float


class Promotion(BaseModel):
    """A challenger that was promoted, or was not."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    reason: str
    model: str
    challenger: str
    """Number of its version."""
    champion: str | None = None
    """Number of the version that it met; None where there was none."""
    scorer: str | None = None
    win_rate: WinRate | None = None
    """None where the two did not meet."""
    threshold: float | None = None
    prompts: int | None = None
    by: str | None = None
    """Who decided."""
    approved: bool | None = None
    """What a person said; None where nobody was asked."""
    at: str | None = None
    """When it was decided, UTC."""
    notes: list[str] = []
    metrics: dict[str, float] = {}
    samples: list[Sample] = []
    mlflow_run_id: str | None = None
    prefect_flow_run_id: str | None = None


def nothing_to_do(settled: Settled) -> Promotion:
    """The outcome where no contest is needed."""
    version = settled.challenger
    return Promotion(
        outcome="nothing to do",
        reason=settled.reason,
        model=version.name,
        challenger=version.number,
    )


def markdown(found: Promotion) -> str:
    """The comparison on a page: numbers, what to know of them, answers to the same prompts."""
    lines = [f"# {literal(found.model)}: version {found.challenger}", "", literal(found.reason)]
    if rows := compared(found):
        lines += ["", *table_head("", "champion", "challenger", right=2)]
        lines += [table_row(literal(label), theirs, ours) for label, theirs, ours in rows]
    if found.notes:
        lines += ["", *(f"- {literal(note)}" for note in found.notes)]
    if found.samples:
        lines += ["", *table_head("prompt", "champion", "challenger")]
        lines += [
            table_row(
                literal(one.prompt),
                f"{literal(one.champion)} ({one.champion_score:.2f})",
                f"{literal(one.challenger)} ({one.challenger_score:.2f})",
            )
            for one in found.samples[:SHOWN_SAMPLES]
        ]
    return "\n".join(lines) + "\n"


def compared(found: Promotion) -> list[tuple[str, str, str]]:
    """What is measured of both: label, the champion's value, the challenger's."""
    labels = {
        "score": f"mean score ({found.scorer})",
        "length_mean": "length (tokens)",
        "ended_fraction": "ended by itself",
        "distinct_2": "distinct-2",
    }
    return [
        (label, f"{found.metrics[theirs]:.3f}", f"{found.metrics[ours]:.3f}")
        for name, label in labels.items()
        if (theirs := f"contest/champion/{name}") in found.metrics
        and (ours := f"contest/challenger/{name}") in found.metrics
    ]


def show(console: Console, found: Promotion, *, shown: bool = False) -> None:
    """Print the decision, and what it rests on unless that was shown."""
    colours = {"promoted": "green", "refused": "yellow", "nothing to do": "green"}
    if found.win_rate is not None and not shown:
        show_comparison(console, found)
    said = Text.assemble((found.outcome, f"bold {colours[found.outcome]}"), f": {found.reason}")
    console.print(said, soft_wrap=True)
    if found.outcome == "promoted":
        console.print("Serve it: plumbline serve", soft_wrap=True)


def show_comparison(console: Console, found: Promotion) -> None:
    """Print the numbers, some answers, and the notes."""
    if found.samples:
        table = Table("prompt", "champion", "challenger", title="Held-out samples", show_lines=True)
        for one in found.samples[:SHOWN_SAMPLES]:
            table.add_row(
                plain(one.prompt),
                Text.assemble(plain(one.champion), (f"\nscore {one.champion_score:.2f}", "dim")),
                Text.assemble(
                    plain(one.challenger), (f"\nscore {one.challenger_score:.2f}", "dim")
                ),
            )
        console.print(table)
    if rows := compared(found):
        table = Table("", "champion", "challenger", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in found.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
