"""The table of each kind of part, and which of its figures have a bar."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.speed.parts import Part
from benchmarks.speed.store import Measurement
from benchmarks.speed.summary import Bar, Difference, Line, Spread, number, ratios

OURS = "plumbline"

PPO_SPEED, PPO_SPEED_BF16 = Bar(5, at_least=True), Bar(3, at_least=True)
PPO_MEMORY = {"ppo-a": Bar(0.5, at_least=False), "ppo-b": Bar(0.65, at_least=False)}
NOT_LOWER = Bar(0, at_least=True)
SUPERVISED = Bar(1.5, at_least=True)
UPDATE = {"fp32": Bar(0.8, at_least=True), "bf16": Bar(0.45, at_least=True)}
VOCABULARY = Bar(1.1, at_least=False)
LINEAR = Bar(0.98, at_least=True)
DATA = {
    "seconds": Bar(90, at_least=False, unit=" s"),
    "peak_mb": Bar(1500, at_least=False, unit=" MB"),
}


class Claim(NamedTuple):
    """A figure that has a bar."""

    part: str
    what: str
    measured: str
    bar: str
    verdict: str


class Results:
    """The measurements of a part by their sides."""

    def __init__(self, part: Part, measurements: Sequence[Measurement]) -> None:
        """Sort them as the part has its sides."""
        self.sides: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        order = {side.name: place for place, side in enumerate(part.sides)}
        for row in sorted(measurements, key=lambda m: (order.get(m.side, len(order)), m.turn)):
            self.sides[row.side][row.turn] = row.result

    def values(self, side: str, name: str) -> dict[int, float]:
        """A figure of a side, by turns."""
        return {turn: result[name] for turn, result in self.sides[side].items()}

    def spread(self, side: str, name: str) -> Spread:
        """The same, over all turns."""
        return Spread.of([*self.values(side, name).values()])

    def over(self, side: str, name: str) -> Spread:
        """Ours over a side's, turn by turn."""
        return ratios(self.values(OURS, name), self.values(side, name))

    @property
    def memory(self) -> str:
        """The memory that is compared: the GPU's, where there is one."""
        own = next(iter(self.sides[OURS].values()))
        return "gpu_peak_mb" if "gpu_peak_mb" in own else "peak_mb"

    @property
    def peers(self) -> list[str]:
        """The sides beside ours that have a turn with ours."""
        own = self.sides.get(OURS, {})
        return [side for side, turns in self.sides.items() if side != OURS and turns.keys() & own]

    def fastest(self, peers: Sequence[str], name: str) -> str | None:
        """The peer with the highest median."""
        return max(peers, key=lambda side: self.spread(side, name).median, default=None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Markdown; the first columns, so many, are texts, the others numbers."""
    rule = ["---" if place < texts else "---:" for place in range(len(head))]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


# PPO.


def _ppo_section(results: Results) -> str:
    own = results.sides[OURS]
    episodes = next(iter(own.values()))["episodes"]
    rows = []
    for side in (OURS, *results.peers):
        speeds = []
        for figure in ("episodes_per_s", "episodes_per_s_from_start"):
            speeds.append(f"{results.spread(side, figure)}")
            speeds.append("" if side == OURS else f"{results.over(side, figure)}")
        share = "" if side == OURS else f"{results.over(side, results.memory)}"
        judged = [r["judged"] for r in results.sides[side].values() if "judged" in r]
        reward = [row["mean"] for row in judged]
        ended = [row["ended_share"] for row in judged]
        rows.append(
            [
                side, *speeds,
                f"{results.spread(side, results.memory)}", share,
                f"{Spread.of(reward)}" if judged else "",
                f"{Spread.of(ended).median:.0%}" if judged else "",
            ]
        )  # fmt: skip
    head = [
        "", "episodes/s", "ours over it", "with the first batch", "ours over it",
        "peak memory, MB", "ours over it", f"reward after {episodes} episodes", "of them ended",
    ]  # fmt: skip
    phases: dict[str, list[float]] = defaultdict(list)
    for result in own.values():
        for phase, seconds in result["phases"].items():
            phases[phase].append(seconds)
    spent = table(
        ["plumbline's seconds", *phases],
        [["for all episodes", *(f"{Spread.of(seconds)}" for seconds in phases.values())]],
    )
    packages = {
        package: version
        for side in results.peers
        for result in results.sides[side].values()
        for package, version in result["packages"].items()
    }
    return f"{table(head, rows)}\n\n{spent}\n\n{_peer(packages)}"


def _peer(packages: dict[str, str]) -> str:
    names = [f"{name} {version}" for name, version in sorted(packages.items())]
    return f"The peer's packages: {', '.join(names)}." if names else ""


def _ppo_claims(part: Part, results: Results) -> Iterator[Claim]:
    peers = results.peers
    plain = [side for side in peers if "defaults" in side]
    narrow = [side for side in peers if "bf16" in side]
    for sides, bar in ((plain, PPO_SPEED), (narrow, PPO_SPEED_BF16)):
        side = results.fastest(sides, "episodes_per_s")
        if side is not None:
            times = results.over(side, "episodes_per_s")
            yield _times(part, f"episodes/s over {side}", times, bar)
    for side in plain:
        share = results.over(side, "peak_mb")
        yield _times(part, f"peak memory over {side}", share, PPO_MEMORY[part.name])
        difference = judged_difference(results, side)
        yield Claim(
            part.name, f"reward less that of {side}, 95% interval", f"{difference}", "not lower",
            NOT_LOWER.verdict(difference.high),
        )  # fmt: skip


def judged_difference(results: Results, side: str) -> Difference:
    """Ours less the side's rewards on the same prompts; of a prompt the mean over the turns."""
    turns = results.sides[OURS].keys() & results.sides[side].keys()
    pairs = [
        (
            results.sides[OURS][turn]["judged"]["scores"],
            results.sides[side][turn]["judged"]["scores"],
        )
        for turn in sorted(turns)
    ]
    by_turn = [[a - b for a, b in zip(*scores, strict=True)] for scores in pairs]
    return Difference.of([sum(column) / len(column) for column in zip(*by_turn, strict=True)])


def _times(part: Part, what: str, value: Spread, bar: Bar) -> Claim:
    return Claim(part.name, what, f"{value}", f"{bar}", bar.verdict(value.median))


# SFT and reward model.


def _unit(results: Results) -> str:
    # A pair has two sequences, and is what a reward model counts.
    own = next(iter(results.sides[OURS].values()))
    return "rows_per_s" if own["kind"] == "reward" else "tokens_per_s"


def _supervised_section(results: Results) -> str:
    unit = _unit(results)
    rows = [
        [
            side, f"{results.spread(side, unit)}",
            "" if side == OURS else f"{results.over(side, unit)}",
            f"{results.spread(side, results.memory)}",
            f"{results.spread(side, 'mean_loss')}",
        ]
        for side in (OURS, *results.peers)
    ]  # fmt: skip
    named = "pairs/s" if unit == "rows_per_s" else "real tokens/s"
    packages: dict[str, str] = next(
        (r["packages"] for s in results.peers for r in results.sides[s].values()), {}
    )
    head = ["", named, "ours over it", "peak memory, MB", "mean loss"]
    return f"{table(head, rows)}\n\n{_peer(packages)}"


def _supervised_claims(part: Part, results: Results) -> Iterator[Claim]:
    unit = _unit(results)
    side = results.fastest(results.peers, unit)
    if side is not None:
        named = "pairs/s" if unit == "rows_per_s" else "tokens/s"
        yield _times(
            part, f"{named} over {side}, its fastest", results.over(side, unit), SUPERVISED
        )


# The update against the machine.


def _utilisation_section(results: Results) -> str:
    rows = [
        [
            side, f"{results.spread(side, 'tokens_per_s')}",
            f"{results.spread(side, 'flops_per_s').median / 1e9:,.0f}",
            f"{_rate(results, side) / 1e9:,.0f}",
            f"{results.spread(side, 'share')}", f"{results.spread(side, 'peak_mb')}",
        ]
        for side in results.sides
    ]  # fmt: skip
    head = [
        "", "real tokens/s, both networks", "GFLOP/s", "of a matrix product", "share",
        "peak memory, MB",
    ]  # fmt: skip
    text = [table(head, rows)]
    for side, turns in results.sides.items():
        profile = next(iter(turns.values()))["profile"]
        rows = [[f"`{row['name']}`", f"{row['share']:.1%}", f"{row['calls']:,}"] for row in profile]
        text += [f"Where the time of a mini-batch goes in {side}:"]
        text += [table(["operation", "share", "calls"], rows)]
    return "\n\n".join(text)


def _rate(results: Results, side: str) -> float:
    """Of matrix products, FLOP/s."""
    return Spread.of([max(result["rates"]) for result in results.sides[side].values()]).median


def _utilisation_claims(part: Part, results: Results) -> Iterator[Claim]:
    for side in results.sides:
        what = f"{side}, share of the rate of matrix products"
        yield _times(part, what, results.spread(side, "share"), UPDATE[side])


# Memory and the vocabulary.


def _by_precision(results: Results) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turns in results.sides.values():
        for result in turns.values():
            found[result["precision"]].append(result)
    return {name: sorted(rows, key=lambda r: r["vocabulary"]) for name, rows in found.items()}


def _vocabulary_section(results: Results) -> str:
    rows = [
        [
            f"{precision}, {row['vocabulary']:,}", f"{row['parameters'] / 1e6:.1f}",
            f"{row['held_mb']:,.0f}", f"{row['gradients_mb']:,.0f}", f"{row['update_mb']:,.0f}",
            f"{row['peak_mb']:,.0f}",
        ]
        for precision, found in _by_precision(results).items()
        for row in found
    ]  # fmt: skip
    head = [
        "vocabulary", "weights of the policy, millions", "held before, MB", "gradients, MB",
        "the update itself, MB", "peak, MB",
    ]  # fmt: skip
    return table(head, rows)


def _vocabulary_claims(part: Part, results: Results) -> Iterator[Claim]:
    for precision, rows in _by_precision(results).items():
        first, last = rows[0], rows[-1]
        if first is not last:
            what = (
                f"{precision}, memory of the update at {last['vocabulary']:,} over "
                f"{first['vocabulary']:,}"
            )
            grown = Spread.of([last["update_mb"] / first["update_mb"]])
            yield _times(part, what, grown, VOCABULARY)


# Straight lines.


def _line(results: Results, side: str) -> Line:
    points = [point for result in results.sides[side].values() for point in result["points"]]
    return Line.through([p["units"] for p in points], [p["seconds"] for p in points])


UNITS = {"episodes": "PPO's episodes", "tokens": "PPO's tokens", "sft": "SFT's tokens"}


def _linearity_section(results: Results) -> str:
    rows = []
    for side, turns in results.sides.items():
        line = _line(results, side)
        points = next(iter(turns.values()))["points"]
        measured = ", ".join(f"{p['units']:,.0f}: {number(p['seconds'])}" for p in points)
        a_unit = f"{number(1e3 * line.slope)} ms, from {number(line.intercept)} s on"
        rows.append([UNITS[side], measured, a_unit, f"{line.r_squared:.4f}"])
    return table(["seconds against", "measured in the first turn", "a unit takes", "R²"], rows)


def _linearity_claims(part: Part, results: Results) -> Iterator[Claim]:
    for side in results.sides:
        fit = _line(results, side).r_squared
        what = f"R² of seconds against {UNITS[side]}"
        yield Claim(part.name, what, f"{fit:.4f}", f"{LINEAR}", LINEAR.verdict(fit))


# A million pairs.


def _rows(results: Results) -> list[dict[str, Any]]:
    return [
        row
        for turns in results.sides.values()
        for result in turns.values()
        for row in result["rows"]
    ]


def _data_section(results: Results) -> str:
    rows = [
        [
            row["work"], f"{row['pairs']:,}", f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:,.0f}",
        ]
        for row in _rows(results)
    ]  # fmt: skip
    return table(["", "pairs", "seconds", "of CPU", "peak memory, MB"], rows)


def _data_claims(part: Part, results: Results) -> Iterator[Claim]:
    for row in _rows(results):
        for name, bar in DATA.items():
            unit = bar.unit
            what = f"{row['work']}, {'seconds' if name == 'seconds' else 'peak memory'}"
            value = row[name]
            yield Claim(part.name, what, f"{number(value)}{unit}", f"{bar}", bar.verdict(value))


# Nothing to do.


def _rerun_section(results: Results) -> str:
    rows = [[row["part"], row["measured"], f"{row['value']:.2f}"] for row in _rows(results)]
    return table(["command", "measured", "times `dvc repro`"], rows)


def _rerun_claims(part: Part, results: Results) -> Iterator[Claim]:
    for row in _rows(results):
        bar = Bar(row["bar"], at_least=False)
        what = f"`plumbline {row['part']}` over a no-op `dvc repro`"
        yield _times(part, what, Spread.of([row["value"]]), bar)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "ppo": _ppo_section,
    "supervised": _supervised_section,
    "utilisation": _utilisation_section,
    "vocabulary": _vocabulary_section,
    "linearity": _linearity_section,
    "data": _data_section,
    "rerun": _rerun_section,
}
CLAIMS: dict[str, Callable[[Part, Results], Iterator[Claim]]] = {
    "ppo": _ppo_claims,
    "supervised": _supervised_claims,
    "utilisation": _utilisation_claims,
    "vocabulary": _vocabulary_claims,
    "linearity": _linearity_claims,
    "data": _data_claims,
    "rerun": _rerun_claims,
}
