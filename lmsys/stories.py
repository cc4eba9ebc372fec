"""The offline default corpus: a seeded generator of short simple stories."""

from __future__ import annotations

import random
from pathlib import Path

from lmsys import records
from lmsys.config import END_OF_TEXT, require


def story(rng: random.Random) -> str:
    """One story."""
    name, place = rng.choice(("Tom", "Lily", "Mia", "Ben")), rng.choice(("park", "garden", "forest", "beach"))
    thing = rng.choice(("ball", "kite", "boat", "hat", "drum"))
    return f"Once upon a time {name} went to the {place}. {name} lost a {thing}. {name} looked and found the {thing}. {name} was happy."


def generate(path: str | Path, size_mb: float, seed: int = 0) -> int:
    """Write at least size_mb (1e6 bytes) of stories, atomically; returns their number. The seed decides every byte."""
    require(size_mb > 0, f"size_mb is {size_mb}; it must be positive")
    rng = random.Random(seed)
    count = written = 0
    with records.atomic_path(path) as temporary, temporary.open("wb") as file:
        while written < size_mb * 1e6:
            written += file.write(f"{story(rng)}\n{END_OF_TEXT}\n".encode())
            count += 1
    return count
