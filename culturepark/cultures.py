"""Cultures and the people in them. Adding a culture is adding one file to `config/cultures/`."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from culturepark.errors import ConfigError
from culturepark.paths import config_dir
from culturepark.words import decoder_in_words

Gender = Literal["woman", "man"]

CULTURE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
"""Culture ids are lower-case, and safe as a part of a file name."""


class PersonaPool(Struct, frozen=True, forbid_unknown_fields=True):
    """What a culture's personas are drawn from. Shares are weights: they need not sum to 1.

    Ages are bands such as `30-44` or `60+`. Places and occupations are nouns without an article,
    as they stand in "lives in a city" and "works as a nurse". The occupation `retired` falls only
    to the oldest band, `student` only to the youngest. `source` says where the shares come from.
    """

    women: tuple[str, ...]
    men: tuple[str, ...]
    ages: dict[str, float]
    places: dict[str, float]
    occupations: dict[str, float]
    source: str = ""


class Culture(Struct, frozen=True, forbid_unknown_fields=True):
    """One culture: who its people are and which survey answers speak for it.

    `survey_keys` name its rows in seed files, best first: ISO alpha-3 for WVS, labels for
    GlobalOpinionQA. A `contact` culture needs none: its people start the talk and hold no drawn
    stance.
    """

    id: str
    name: str
    demonym: str
    country: str
    language: str
    survey_keys: tuple[str, ...]
    personas: PersonaPool
    hofstede_row: str = ""


class Persona(Struct, frozen=True):
    """One person of a dialogue."""

    culture: str
    name: str
    gender: Gender
    age: str
    place: str
    occupation: str


# The registry


def load_cultures(folder: Path | None = None, extra: Iterable[Path] = ()) -> dict[str, Culture]:
    """Read every `*.toml` of `folder` (default: the shipped cultures) and of the `extra` folders.

    Returns the cultures by id, sorted by id. Raises ConfigError, naming the file and the key, for
    a folder without cultures, a file that cannot be used, or an id that two folders share.
    """
    shipped = folder if folder is not None else config_dir() / "cultures"
    found: dict[str, tuple[Path, Culture]] = {}
    for each in (shipped, *extra):
        for path in _culture_files(each):
            culture = _read(path)
            if culture.id in found:
                raise ConfigError(
                    f"{path}: $.id",
                    f'the culture "{culture.id}" is already defined in {found[culture.id][0]}.',
                    "Give this culture another id, and its file the same name.",
                )
            found[culture.id] = (path, culture)
    return {key: found[key][1] for key in sorted(found)}


def culture_named(registry: Mapping[str, Culture], culture_id: str, where: str = "culture") -> Culture:
    """The culture with this id.

    Raises ConfigError at `where`, with the likeliest meant id (a near spelling, or the culture
    whose country or name this is) and the list of known ids.
    """
    if culture_id in registry:
        return registry[culture_id]
    import difflib  # only errors need it

    meant: dict[str, str] = {}
    for key, culture in registry.items():
        for alias in (key, culture.name, culture.country, culture.demonym):
            meant.setdefault(alias.lower(), key)
    near = difflib.get_close_matches(culture_id.lower(), meant, n=1)
    hint = f'Did you mean "{meant[near[0]]}"? ' if near else ""
    raise ConfigError(
        where,
        f'there is no culture "{culture_id}".',
        f"{hint}Known cultures: {', '.join(sorted(registry)) or 'none'}.",
    )


def _culture_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(str(folder), "there is no such folder of cultures.", "Check the path.")
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ConfigError(
            str(folder),
            "this folder holds no culture: no file here ends in .toml.",
            "Copy a file of `config/cultures/` into it and change what it says.",
        )
    return files


def _read(path: Path) -> Culture:
    try:
        culture = msgspec.toml.decode(path.read_bytes(), type=Culture)
    except OSError as error:
        raise ConfigError(str(path), f"the file cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "the file is not UTF-8 text.", "Save it as UTF-8.") from error
    except msgspec.ValidationError as error:
        raise _misfit(path, str(error)) from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            str(path), f"the file is not valid TOML: {error}.", "Mend the line it names."
        ) from error
    _check(path, culture)
    return culture


_MISFIT = re.compile(r"(?P<what>.*?)(?: - at `(?P<key>[^`]+)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<fault>contains unknown|missing required) field `(?P<field>.*)`", re.DOTALL)


def _misfit(path: Path, message: str) -> ConfigError:
    """What msgspec found wrong with a culture file, as an error that names the key."""
    parts = _MISFIT.fullmatch(message)
    what, key = (parts["what"], parts["key"] or "$") if parts else (message, "$")
    inside = key.endswith("[...]")  # of a table; the decoder does not say which entry it means
    key = key.removesuffix("[...]")
    if field := _FIELD.fullmatch(what):
        where = f"{path}: {key}.{field['field']}"
        if field["fault"] == "missing required":
            return ConfigError(where, "this key is missing.", "Every culture file must set it.")
        known = PersonaPool if key == "$.personas" else Culture
        return ConfigError(
            where, "no such key is known here.", f"Known keys: {', '.join(known.__struct_fields__)}."
        )
    what = decoder_in_words(what)
    if inside:
        what = what.replace("this must be", "each value must be", 1)
    return ConfigError(f"{path}: {key}", f"{what}.", "Compare it with a file of `config/cultures/`.")


_AGE_BAND = re.compile(r"(\d{1,3})(?:-\d{1,3}|\+)")


def _check(path: Path, culture: Culture) -> None:
    """Refuse what has the right types and still cannot serve. Raises ConfigError."""
    _check_id(path, culture)
    _check_texts(path, culture)
    _check_shares(path, culture.personas)
    _check_people(path, culture.personas)


def _refusal(path: Path, key: str, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{path}: $.{key}", what, fix)


def _check_id(path: Path, culture: Culture) -> None:
    if not CULTURE_ID.fullmatch(culture.id):
        what = f'"{culture.id}" cannot be an id.'
        fix = "Use at most 64 lower-case letters, digits and hyphens, starting with a letter or digit."
        raise _refusal(path, "id", what, fix)
    if culture.id != path.stem:
        what = f'the id "{culture.id}" differs from the name of its file.'
        fix = f'Set id = "{path.stem}", or rename the file to {culture.id}.toml.'
        raise _refusal(path, "id", what, fix)


def _check_texts(path: Path, culture: Culture) -> None:
    """Words go into prompts as they stand: a line break in one would break the sentence."""
    pool = culture.personas
    texts: dict[str, Sequence[str]] = {
        "name": [culture.name],
        "demonym": [culture.demonym],
        "country": [culture.country],
        "language": [culture.language],
        "survey_keys": culture.survey_keys,
        "personas.women": pool.women,
        "personas.men": pool.men,
        "personas.ages": list(pool.ages),
        "personas.places": list(pool.places),
        "personas.occupations": list(pool.occupations),
    }
    for key, values in texts.items():
        for value in values:
            if not value or value != value.strip() or not value.isprintable():
                what = f"{value!r} is empty, starts or ends in a space, or holds a line break."
                raise _refusal(path, key, what, "Write it as it reads in a sentence.")
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise _refusal(path, key, f'"{repeated[0]}" stands here more than once.', "Keep it once.")
    for key, names in (("personas.women", pool.women), ("personas.men", pool.men)):
        if len(names) < 2:
            what = "this needs at least two names, so that two people of one dialogue can be told apart."
            raise _refusal(path, key, what, "Add names that are common in this culture.")


def _check_shares(path: Path, pool: PersonaPool) -> None:
    for key, weights in (
        ("personas.ages", pool.ages),
        ("personas.places", pool.places),
        ("personas.occupations", pool.occupations),
    ):
        for value, weight in weights.items():
            if not math.isfinite(weight) or weight < 0:
                what = f"a share cannot be {weight}."
                raise _refusal(path, f'{key}."{value}"', what, "Use a number that is 0 or more.")
        if not any(weights.values()):
            what = "nothing here has a share above 0."
            raise _refusal(path, key, what, "Give at least one a share, such as 1.0.")


def _check_people(path: Path, pool: PersonaPool) -> None:
    for band in pool.ages:
        if not _AGE_BAND.fullmatch(band):
            key = f'personas.ages."{band}"'
            raise _refusal(path, key, "this is not an age band.", 'Write it as "30-44" or "60+".')
    if not any(weight for work, weight in pool.occupations.items() if work not in ("retired", "student")):
        what = "people who are neither retired nor students have no occupation to draw."
        raise _refusal(path, "personas.occupations", what, "Add an occupation that suits every age.")


# The people


def draw_persona(
    culture: Culture, gender: Gender, rng: random.Random, avoid_name: str | None = None
) -> Persona:
    """Draw one person of this culture by its shares; equal states of `rng` give equal people.

    Names are drawn evenly, `avoid_name` (the other person of the dialogue) excepted. Only the
    oldest age band holds the occupation `retired`, and only the youngest `student`.
    """
    pool = culture.personas
    names = [name for name in (pool.women if gender == "woman" else pool.men) if name != avoid_name]
    name = rng.choice(names)
    age = _draw(pool.ages, rng)
    place = _draw(pool.places, rng)
    youngest, oldest = _ends(tuple(pool.ages))
    barred = {work for work, band in (("student", youngest), ("retired", oldest)) if age != band}
    occupation = _draw({work: share for work, share in pool.occupations.items() if work not in barred}, rng)
    return Persona(culture.id, name, gender, age, place, occupation)


@lru_cache(maxsize=256)
def _ends(bands: tuple[str, ...]) -> tuple[str, str]:
    """The youngest and the oldest age band."""
    ordered = sorted(bands, key=lambda band: int(re.split(r"[-+]", band)[0]))
    return ordered[0], ordered[-1]


def _draw(shares: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


_STATES = frozenset({"retired", "unemployed"})
_ROLES = frozenset({"student", "homemaker"})


def describe(persona: Persona, culture: Culture) -> str:
    """A persona as a noun phrase, to be followed by a comma or a full stop.

    For example "Rania, a Jordanian woman aged 30-44 who lives in a city and works as a nurse".
    """
    if persona.occupation in _STATES:
        does = f"is {persona.occupation}"
    elif persona.occupation in _ROLES:
        does = f"is {_with_article(persona.occupation)}"
    else:
        does = f"works as {_with_article(persona.occupation)}"
    return (
        f"{persona.name}, {_with_article(culture.demonym)} {persona.gender} aged {persona.age} "
        f"who lives in {_with_article(persona.place)} and {does}"
    )


# The article follows the sound: "a Ukrainian", "a university town", but "an Uzbek", "an uninsured driver".
_VOWEL_SOUND = re.compile(
    r"(?!eu|uni(?!n)|ukr|urug|ugand|uro|used|one\b)[aeiou]|hour|heir|hono", re.IGNORECASE
)


def _with_article(noun: str) -> str:
    return f"{'an' if _VOWEL_SOUND.match(noun) else 'a'} {noun}"
