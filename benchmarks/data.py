"""What it costs to validate, split and write a large data set: seconds and peak memory.

    python benchmarks/data.py                               # a million pairs: some minutes
    python benchmarks/data.py --pairs 50000 100000 200000   # how both grow with the rows

The memory is that of all processes together.

A data set of made-up words is generated: so many preference pairs, a twentieth of that as
demonstrations and as prompts. Lengths, word frequencies and punctuation are about those of English
chats; no two texts are the same. Then, each in a process of its own,

check    `plumbline data check`, start and imports included; the tokenizer is trained on the way
prepare  `plumbline.data.prepare.prepare` as the step prepare_data calls it

Prints a table; exits with 1 if a million pairs take more than BARS.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
BARS = {"seconds": 90.0, "peak_mb": 1500.0}
"""For a million pairs."""

SHARE = 20
"""Pairs for each demonstration, and for each prompt without an answer."""
WORDS = 50_000
PROMPT_WORDS, RESPONSE_WORDS = 20, 40
"""On average; some 130 tokens a pair for a tokenizer that knows the language."""

EXPERIMENT = """\
description: A large data set, to be validated.
data:
  path: data/large
  max_prompt_tokens: 512
  max_response_tokens: 768
model:
  source: scratch
  vocab_size: 8192
  context_tokens: 1280
"""

PREPARE = """\
import sys
from pathlib import Path
from plumbline.data.prepare import prepare
from plumbline.params.loader import load_experiment
from tasks.validation import limits_of, token_counter

root = Path(sys.argv[1])
experiment = load_experiment("large", root / "params").experiment
prepare(
    root / experiment.data.path,
    root / "prepared",
    test_fraction=experiment.data.test_fraction,
    on_invalid=experiment.data.on_invalid,
    limits=limits_of(experiment.data),
    counter_for=token_counter(experiment.model, root),
    long_prompts=experiment.data.long_prompts,
)
"""


class Language:
    """Made-up words, the k-th with a frequency near 1 / k, some with punctuation.

    1,500 pairs of hh-rlhf have 23,000 different words (up to the next space) in 356,000; 1,500 of
    these have 36,000 in 287,000. More than half of the texts have two spaces in a row somewhere, as
    there.
    """

    def __init__(self, seed: int) -> None:
        """Make the words."""
        self._random = np.random.default_rng(seed)
        consonants = [*"bcdfghklmnprstvw", "br", "st", "th"]
        syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]
        ranks = np.arange(1, WORDS + 1)
        # Frequent words are short, as in any language.
        sizes = 1 + np.log10(ranks).astype(int) // 2 + self._random.integers(0, 2, WORDS)
        words = ["".join(self._random.choice(syllables, size)) for size in sizes]
        ends = {"": 0.88, ",": 0.05, ".": 0.04, ". ": 0.02, ".\n\n": 0.01}
        self._words = np.array([word + end for end in ends for word in words], dtype=object)
        frequencies = (ranks + 2.7) ** -1.15
        shares = np.concatenate([frequencies * share for share in ends.values()])
        self._cumulative = np.cumsum(shares / shares.sum())

    def texts(self, mean_words: int) -> Iterator[str]:
        """Texts without end; their numbers of words spread by a factor of two around the mean."""
        while True:
            sizes = self._random.lognormal(np.log(mean_words), 0.5, 10_000).astype(int) + 2
            drawn = np.searchsorted(self._cumulative, self._random.random(sizes.sum()))
            words = self._words[drawn.clip(max=len(self._words) - 1)].tolist()
            ends = np.cumsum(sizes).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                text = " ".join(words[start:end]).replace("\n ", "\n")
                yield text.strip().capitalize()


def write_data(folder: Path, pairs: int) -> None:
    """Write the three tables."""
    folder.mkdir(parents=True)
    language = Language(seed=0)
    prompts, responses = language.texts(PROMPT_WORDS), language.texts(RESPONSE_WORDS)

    def write(file: TextIO, count: int, *fields: str) -> None:
        for _ in range(count):
            row = {"prompt": next(prompts)} | {field: next(responses) for field in fields}
            file.write(json.dumps(row) + "\n")

    fields = {"demonstrations": ["response"], "preferences": ["chosen", "rejected"], "prompts": []}
    for table, answers in fields.items():
        with (folder / f"{table}.jsonl").open("w", encoding="utf-8") as file:
            write(file, pairs if table == "preferences" else max(pairs // SHARE, 40), *answers)


class Measured(NamedTuple):
    """What a process took."""

    pairs: int
    work: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


def measure(project: Path, pairs: int, work: str) -> Measured:
    """Run the work in a process of its own."""
    arguments = ["-m", "flows.cli", "data", "check", "large"]
    if work == "prepare":
        arguments = ["-c", PREPARE, str(project)]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PLUMBLINE_HOME": str(project / "home"),
    }
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=project, env=environment, stdout=subprocess.DEVNULL
    )
    peak = 0
    while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
        peak = max(peak, resident_bytes(child.pid))
        time.sleep(0.2)
    _, status, usage = ended
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if child.returncode:
        raise SystemExit(f"{work} with {pairs} pairs ended with {child.returncode}")
    # Of one process, to its last byte; in kilobytes on Linux.
    peak = max(peak, usage.ru_maxrss * 1024)
    return Measured(pairs, work, seconds, usage.ru_utime + usage.ru_stime, peak / 1e6)


def resident_bytes(pid: int) -> int:
    """The memory of a process and all that it has started; what these share counts for each."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def table(results: list[Measured]) -> str:
    """A row for each process."""
    rows = ["| pairs | work | seconds | of CPU | peak memory, MB |", "|---|---|---|---|---|"]
    rows += [
        f"| {r.pairs:,} | {r.work} | {r.seconds:.1f} | {r.cpu_seconds:.1f} | {r.peak_mb:,.0f} |"
        for r in results
    ]
    return "\n".join(rows)


def main() -> int:
    """Measure, print, and say whether the bars were reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000])
    parser.add_argument(
        "--work", nargs="+", choices=["check", "prepare"], default=["check", "prepare"]
    )
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    results = []
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder)
            (project / "params").mkdir()
            (project / "params" / "large.yaml").write_text(EXPERIMENT, encoding="utf-8")
            (project / "data.dvc").touch()
            write_data(project / "data" / "large", pairs)
            for work in options.work:
                results.append(measure(project, pairs, work))
                print(results[-1], file=sys.stderr, flush=True)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([r._asdict() for r in results], indent=1) + "\n")
    large = [r for r in results if r.pairs == 1_000_000]
    return int(any(r.seconds > BARS["seconds"] or r.peak_mb > BARS["peak_mb"] for r in large))


if __name__ == "__main__":
    sys.exit(main())
