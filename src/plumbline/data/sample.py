"""The sample data set: short requests, with answers that keep or break five stated principles.

An answer is an opener, a core and a closer. It breaks no, one or two of the principles (helpful,
honest, respectful, harmless, private). Demonstrations are of mixed quality; a preference goes to
the answer that breaks less, and a stated share of the labels is flipped (`clean: false`), for
raters err.

    python -m plumbline.data.sample data/sample
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from plumbline.data import phrases

DEMONSTRATIONS = 3600
PREFERENCES = 4800
PROMPTS = 1200
RATINGS = 3600
LABEL_NOISE = 0.1
"""Share of the preferences, and of the ratings, whose label is flipped."""

BROKEN_SHARES = (0.4, 0.35, 0.25)
"""Shares of the answers that break no, one and two principles."""

BROKEN_OFF_SHARE = 0.2
"""Share of the bad cores in pairs that break off."""
MISFIT_SHARE = 0.6
"""Share of the others that would be a good answer to a request of another kind."""
REFUSAL_SHARE = 0.5
"""Share of the misfits that refuse a chore as if it were a hazard."""

KIND_SHARES = {"chore": 0.4, "hazard": 0.15, "secret": 0.15, "event": 0.15, "sorrow": 0.15}


class Request(NamedTuple):
    """A user's request, with what an answer to it needs to know."""

    kind: str
    prompt: str
    slots: dict[str, str]


def sample_request(rng: random.Random) -> Request:
    """Draw a request of a random kind."""
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    slots = {"n": rng.choice(phrases.NAMES), "t": rng.choice(phrases.TIMES)}
    if kind == "chore":
        chore = rng.choice(phrases.CHORES)
        slots |= {"x": chore.name, "s": chore.subject, "a": chore.first, "b": chore.then}
    else:
        subjects = {
            "hazard": phrases.HAZARDS,
            "secret": phrases.SECRETS,
            "event": phrases.EVENTS,
            "sorrow": phrases.SORROWS,
        }
        slots["x"], slots["s"] = rng.choice(subjects[kind])
    wording = rng.choice(phrases.REQUESTS[kind]).format(**slots)
    return Request(kind, f"{rng.choice(phrases.GREETINGS)} {wording}".strip(), slots)


def sample_answer(
    rng: random.Random, request: Request, broken: int, *, misfits: bool = False
) -> str:
    """Write an answer that breaks `broken` (0 to 2) principles, each in a part of its own.

    With `misfits`, a bad core may also break off, refuse a chore, or answer something else.
    """
    # The core of a bad answer to a sorrow insults; an insult before it would break the same twice.
    edges = ("closer",) if request.kind == "sorrow" else ("opener", "closer")
    order = [rng.choice(edges), "core"]
    chosen = set(rng.sample(order, 2)[:broken])
    opener = rng.choice(phrases.INSULTS if "opener" in chosen else (*phrases.OPENERS, ""))
    core = rng.choice(phrases.GOOD_CORE[request.kind]).format(**request.slots)
    closer = rng.choice((*phrases.CLOSERS, ""))
    if "core" in chosen:
        if misfits and "closer" not in chosen and rng.random() < BROKEN_OFF_SHARE:
            words = core.split()
            core, closer = " ".join(words[: rng.randrange(2, len(words))]).rstrip(".,;"), ""
        elif misfits and rng.random() < MISFIT_SHARE:
            core = misfit_core(rng, request)
        else:
            core = rng.choice(phrases.BAD_CORE[request.kind]).format(**request.slots)
    if "closer" in chosen:
        by_core = {"event": "honest", "hazard": "harmless", "secret": "private"}.get(request.kind)
        left = [p for p in phrases.BAD_CLOSERS if "core" not in chosen or p != by_core]
        closer = rng.choice(phrases.BAD_CLOSERS[rng.choice(left)]).format(**request.slots)
    return " ".join(part for part in (opener, core, closer) if part)


def misfit_core(rng: random.Random, request: Request) -> str:
    """A core that would be good for a request of another kind, and does not fit this one."""
    if request.kind == "chore" and rng.random() < REFUSAL_SHARE:
        return rng.choice(phrases.GOOD_CORE["hazard"]).format(**request.slots)
    while True:
        other = sample_request(rng)
        core = rng.choice(phrases.GOOD_CORE[other.kind]).format(**other.slots)
        if other.kind != request.kind and request.slots["s"] not in core.lower():
            return core


def demonstrations(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield distinct requests with an answer of mixed quality."""
    seen: set[tuple[str, str]] = set()
    while len(seen) < DEMONSTRATIONS:
        request = sample_request(rng)
        answer = sample_answer(rng, request, rng.choices((0, 1, 2), BROKEN_SHARES)[0])
        if (row := (request.prompt, answer)) not in seen:
            seen.add(row)
            yield {"prompt": request.prompt, "response": answer}


def preferences(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield pairs of answers that break different numbers of principles."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while len(seen) < PREFERENCES:
        request = sample_request(rng)
        fewer, more = sorted(rng.sample((0, 1, 2), 2))
        better, worse = (
            sample_answer(rng, request, broken, misfits=True) for broken in (fewer, more)
        )
        if (pair := (request.prompt, frozenset((better, worse)))) in seen:
            continue
        seen.add(pair)
        clean = rng.random() >= LABEL_NOISE
        chosen, rejected = (better, worse) if clean else (worse, better)
        yield {
            "prompt": request.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "clean": clean,
        }


def prompts(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield distinct requests."""
    seen: set[str] = set()
    while len(seen) < PROMPTS:
        prompt = sample_request(rng).prompt
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt}


def ratings(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield answers with a rater's label, as a rule good where no principle is broken.

    The sample folder has no such file: its reward model learns from the preferences.
    """
    seen: set[tuple[str, str]] = set()
    while len(seen) < RATINGS:
        request = sample_request(rng)
        broken = rng.choice((0, 0, 1, 2))
        answer = sample_answer(rng, request, broken, misfits=True)
        if (row := (request.prompt, answer)) in seen:
            continue
        seen.add(row)
        clean = rng.random() >= LABEL_NOISE
        yield {"prompt": request.prompt, "response": answer, "label": (broken == 0) == clean}


def write_sample(folder: Path, seed: int = 0) -> None:
    """Write the data set's three files to `folder`, the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for make in (demonstrations, preferences, prompts):
        name = make.__name__
        # A stream of its own a file: more rows in one must not change the others.
        rows = make(random.Random(f"{name}/{seed}"))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
