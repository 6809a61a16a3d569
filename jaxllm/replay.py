"""Ledgers and recipes: what was done to a model, as transforms that do it again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np

from jaxllm.calibrate import describe
from jaxllm.checkpoint.native import MANIFEST
from jaxllm.evaluate import calibration_text, token_windows
from jaxllm.lm import LM, Entry, Transform, check_order, check_tokens
from jaxllm.transforms.compact import compact
from jaxllm.transforms.layerwise import Layerwise
from jaxllm.transforms.prune import prune
from jaxllm.transforms.quantize import quantize, quantize_kv

ORIGINS = ("load", "init")  # entries that say where a model came from
# What an entry's name stands for; its arguments are checked against the function's own annotations.
TRANSFORMS: Mapping[str, Callable[..., Transform]] = {
    function.__name__: function for function in (compact, prune, quantize, quantize_kv)
}
_MAX_BYTES = 64 * 1024**2  # of a JSON file: a saved model's manifest lists every file of its weights
_MAX_ENTRIES = 1000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Transforms in order, and what to call them."""

    title: str
    transforms: tuple[Transform, ...]


def transforms_of(ledger: Sequence[Entry], calibration: Any = None) -> list[Transform]:
    """The transforms that a ledger tells of, in order: on the model that it began with they make the same model again.

    calibration: a text, or integer ids [N, T], for entries that saw another text than the one that ships with the
        package. A text is cut into the windows that the entry recorded. An entry that recorded none (one written by
        hand) sees it whole.
    Raises ValueError for an entry that is unknown, has unknown arguments, stands in an illegal order, or was made by an
    import. The transforms themselves raise it, before they or later ones start, when neither the given text nor the
    shipped one is the recorded one.
    """
    steps, names = [], []
    for entry in ledger:
        if entry.name not in ORIGINS:
            check_order(names, entry.name)
            steps.append((entry, *_checked(entry)))
        elif names:
            raise ValueError(f"The ledger has {entry.name!r} after {names[-1]!r}; only its first line tells an origin.")
        names.append(entry.name)
    texts = [entry.args.get("calibration") for entry, *_ in steps]
    return [_again(make, args, texts[i:], calibration) for i, (_, make, args) in enumerate(steps)]


def _checked(entry: Entry) -> tuple[Callable[..., Transform], dict[str, Any]]:
    """What makes the entry's transform, with its arguments but for the calibration text. Makes it once, as a check."""
    if entry.name not in TRANSFORMS:
        raise ValueError(f"{entry.name!r} cannot be done again; there are {', '.join(TRANSFORMS)}.")
    if "imported" in entry.args:
        raise ValueError(
            f"This {entry.name} was done before the weights were imported ({entry.args['imported']}); "
            "it cannot be done again. Start from the imported model."
        )
    make = TRANSFORMS[entry.name]
    hints = typing.get_type_hints(make)
    known = [name for name in hints if name != "return"]
    for name, value in entry.args.items():
        if name not in known:
            raise ValueError(f"{entry.name} has no argument {name!r}; it has {', '.join(known) or 'none'}.")
        if not _fits(value, hints[name]):
            expected = inspect.formatannotation(hints[name]).replace("collections.abc.", "")
            raise ValueError(f"{entry.name}: {name} is {value!r}; expected {expected}.")
    if (text := entry.args.get("calibration")) is not None and not _describes(text):
        raise ValueError(
            f"{entry.name}: calibration is {text!r}; expected what a ledger says of a text: "
            '{"windows": [N, T], "sha256": 16 hexadecimal digits}, or null.'
        )
    args = {name: value for name, value in entry.args.items() if name != "calibration"}
    make(**args)
    return make, args


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type. What a literal may be is left to the function that takes it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(part, inner[1]) for part in value.values())
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(part, inner[0]) for part in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _describes(text: Any) -> bool:
    if not isinstance(text, dict) or text.keys() != {"windows", "sha256"}:
        return False
    windows, digest = text["windows"], text["sha256"]
    counts = isinstance(windows, list) and len(windows) == 2 and all(type(n) is int and n > 0 for n in windows)
    return counts and isinstance(digest, str) and re.fullmatch("[0-9a-f]{16}", digest) is not None


def _again(
    make: Callable[..., Transform], args: Mapping[str, Any], texts: Sequence[Any], calibration: Any
) -> Transform:
    """texts: what this entry and those after it saw; all are looked for before this one starts."""
    made = make(**args)
    if texts[0] is None and (calibration is None or "calibration" not in inspect.signature(make).parameters):
        return made

    def on_text(lm: LM) -> Any:
        tokens = [_tokens(lm, text, calibration) for text in texts]
        return make(**args, calibration=tokens[0])

    if isinstance(made, Layerwise):  # and so is what does it again
        return dataclasses.replace(made, plan=lambda lm: on_text(lm).plan(lm))
    return lambda lm: on_text(lm)(lm)


def _tokens(lm: LM, text: Mapping[str, Any] | None, calibration: Any) -> Any:
    """The ids [N, T] that `text` describes; what was given where it describes none."""
    if text is None:
        return token_windows(lm, calibration) if isinstance(calibration, str) else calibration
    count, length = text["windows"]
    seen = {}
    for name, given in {"the one given": calibration, "the one that ships with jaxllm": calibration_text()}.items():
        if given is None or (isinstance(given, str) and lm.tokenizer is None):
            continue
        windows = token_windows(lm, given, max(length, 2), count) if isinstance(given, str) else given
        tokens_NT: np.ndarray = check_tokens(lm.cfg, windows)
        seen[name] = describe(tokens_NT)
        if seen[name] == text:
            return tokens_NT
    found = "; ".join(f"{name} is {each}" for name, each in seen.items()) or "None was given, and there is no tokenizer"
    raise ValueError(
        f"The ledger's transforms saw the calibration text {dict(text)}. {found}. "
        "Give the recorded text, or its token ids, as `calibration` (--calibration FILE)."
    )


def load_recipe(path: str | os.PathLike[str], calibration: Any = None) -> Recipe:
    """Transforms from a file.

    path: a saved model's directory or its jaxllm.json, another JSON file that holds a ledger (a list of entries, or an
        object with "ledger"), or a Python script that defines `transform`, or `transforms`, a list of them or a
        function of calibration that makes one; the first line of its docstring is its title. JSON is data and never
        runs code. A script is run as it stands, with all that you may do: name only your own.
    calibration: see `transforms_of`; a script gets it where `transforms` is a function, and else brings its own.
    Raises FileNotFoundError, and ValueError that names the file for one that holds no such thing.
    """
    path = Path(path)
    if path.is_dir():
        path /= MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; expected a .py script, a JSON ledger, or the directory of a saved model."
        )
    if path.suffix == ".py":
        return _run(path, calibration)
    try:
        ledger = read_ledger(path)
        transforms = tuple(transforms_of(ledger, calibration))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not transforms:
        raise ValueError(f"{path} holds a ledger without transforms; there is nothing to do again.")
    return Recipe(" + ".join(entry.name for entry in ledger if entry.name not in ORIGINS), transforms)


def read_ledger(path: Path) -> tuple[Entry, ...]:
    """The entries in a JSON file, well-formed; whether their transforms are known is for `transforms_of` to say."""
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes; a ledger has at most {_MAX_BYTES}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}.") from error
    value = value.get("ledger") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError('it holds no ledger; expected a list of entries, or an object with "ledger".')
    if len(value) > _MAX_ENTRIES:
        raise ValueError(f"its ledger has {len(value)} entries; at most {_MAX_ENTRIES} are read.")
    return tuple(_entry(each, at) for at, each in enumerate(value))


def _entry(value: Any, at: int) -> Entry:
    types_ = {"name": str, "args": dict, "touched": dict, "parent": str}
    if not isinstance(value, dict) or not {"name", "args"} <= value.keys() <= types_.keys():
        raise ValueError(f"entry {at} is {_short(value)}; expected an object with name, args, touched and parent.")
    for name, part in value.items():
        if not isinstance(part, types_[name]):
            raise ValueError(f"entry {at}: {name} is {_short(part)}; expected a {types_[name].__name__}.")
    return Entry(**value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _run(path: Path, calibration: Any) -> Recipe:
    try:
        found = runpy.run_path(str(path))
        if callable(make := found.get("transforms")):
            found["transforms"] = make(calibration)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} failed: {type(error).__name__}: {error}") from error
    both = [name for name in ("transform", "transforms") if name in found]
    given = found.get("transforms", [found.get("transform")])
    if len(both) != 1 or not isinstance(given, list | tuple) or not given or not all(map(callable, given)):
        raise ValueError(
            f"{path} defines {' and '.join(both) or 'neither'}; expected either `transform`, a function LM -> LM such "
            "as jaxllm.quantize() returns, or `transforms`, a list of them or a function of calibration that makes one."
        )
    title = (inspect.cleandoc(found.get("__doc__") or "") or path.stem).splitlines()[0]
    return Recipe(title, tuple(given))
