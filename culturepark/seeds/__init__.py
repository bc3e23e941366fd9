"""Seeds: survey questions with people's answers, built in, imported, or from the user's own file."""

from culturepark.seeds.builtin import builtin_seeds, wvs7_column
from culturepark.seeds.check import check_seed
from culturepark.seeds.globalopinionqa import import_globalopinionqa
from culturepark.seeds.imported import ImportResult
from culturepark.seeds.jsonl import encode_seeds, read_seeds, write_seeds
from culturepark.seeds.load import load_seeds
from culturepark.seeds.model import SEED_ID, Answers, Option, Scale, Seed, Side
from culturepark.seeds.stance import DrawMethod, Stance, draw, stance_of
from culturepark.seeds.wvs import import_wvs

__all__ = [
    "SEED_ID",
    "Answers",
    "DrawMethod",
    "ImportResult",
    "Option",
    "Scale",
    "Seed",
    "Side",
    "Stance",
    "builtin_seeds",
    "check_seed",
    "draw",
    "encode_seeds",
    "import_globalopinionqa",
    "import_wvs",
    "load_seeds",
    "read_seeds",
    "stance_of",
    "write_seeds",
    "wvs7_column",
]
