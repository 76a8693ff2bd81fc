"""Rewards: 1.0 or 0.0 from a completion and its ground truth, parsed and never evaluated; and a user's own function.

Which reward a row gets is data.py's choice (`Example.reward`, a key of `REWARDS`), unless --reward names another.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data import Example


class RewardError(ValueError):
    """A --reward that cannot be used; the message names the file or function and the fix."""


_TAIL = 4_000  # characters at a completion's end that are searched for the answer
_LONGEST_NUMBER = 64  # characters
_BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
_NUMBER = re.compile(  # after spaces are single; every part is bounded or unambiguous, so matching is linear
    r"\${0,2} ?(?P<sign>[+-]?) ?\${0,2} ?(?P<digits>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r" ?(?:\\?%)?(?P<unit>(?: [A-Za-z]+)*) ?\.?\${0,2}\.?"
)
_NOT_A_UNIT = re.compile(  # words that change the value, or offer a second one
    r"\b(?:hundred|thousand|million|billion|trillion|dozen)s?\b|\b(?:half|point|and|or|plus|minus|over)\b",
    re.IGNORECASE,
)


def parse_number(text: str, unit: bool = True) -> Decimal | None:
    """The one number that `text` is, or None: "-$1,234.50", "50\\%", "342 dollars" (the last only with `unit`)."""
    if len(text) > _LONGEST_NUMBER:
        return None
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("{,}", ",")
    match = _NUMBER.fullmatch(" ".join(_LATEX_TEXT.sub(r" \1 ", text).split()))
    if match is None or (match["unit"] and (not unit or _NOT_A_UNIT.search(match["unit"]))):
        return None
    return Decimal(match["sign"] + match["digits"].replace(",", ""))


def _marked_answer(completion: str) -> str | None:
    """What the last balanced `\\boxed{...}` or the line after the last `####` holds; None without either."""
    text = completion[-_TAIL:]
    start, answer = -1, None
    opened: list[re.Match] = []
    for brace in _BRACES.finditer(text):
        if brace[0] in ("{", "\\boxed{"):
            opened.append(brace)
        elif brace[0] == "}" and opened:
            begin = opened.pop()
            if begin[0] != "{" and begin.start() > start:
                start, answer = begin.start(), text[begin.end() : brace.start()]
    hashes = text.rfind("####")
    if hashes > start:
        answer = text[hashes + 4 :].partition("\n")[0]
    return None if answer is None else answer.strip()


def _same_number(text: str, answer: str, unit: bool = True) -> float:
    value = parse_number(text, unit)
    return float(value is not None and value == parse_number(answer))


def gsm8k_reward(completion: str, answer: str) -> float:
    """1.0 if the last `\\boxed{x}` or `#### x` is the number `answer`; without either, 0.0."""
    marked = _marked_answer(completion)
    return 0.0 if marked is None else _same_number(marked, answer)


def number_reward(completion: str, answer: str) -> float:
    """As `gsm8k_reward`; without box or `####` the whole completion must be the number and nothing else."""
    marked = _marked_answer(completion)
    return _same_number(completion.strip(), answer, unit=False) if marked is None else _same_number(marked, answer)


def exact_reward(completion: str, answer: str) -> float:
    """1.0 if the last `\\boxed{x}` or `#### x`, or without either the whole completion, is `answer`, stripped."""
    marked = _marked_answer(completion)
    return float((completion.strip() if marked is None else marked) == answer.strip())


REWARDS = {"number": number_reward, "gsm8k": gsm8k_reward, "exact": exact_reward}


def resolve_reward(spec: str | None) -> Callable[[str, str, dict], float] | None:
    """The function that `--reward file.py:function` names, called as function(completion, answer, row) -> float.

    None stays None: every row's own reward. Raises RewardError for a file or function that cannot be used.
    """
    if spec is None:
        return None
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name or path.suffix != ".py":
        raise RewardError(f"--reward {spec}: give file.py:function")
    if not path.is_file():
        raise RewardError(f"--reward {spec}: no such file: {path}")
    module_spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"--reward {spec}: importing {path} failed ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        problem = "is not callable" if hasattr(module, name) else "is not there"
        raise RewardError(f"--reward {spec}: '{name}' {problem} in {path}; define def {name}(completion, answer, row)")
    return function


def score(
    reward: Callable[[str, str, dict], float] | None, example: Example, completion: str
) -> tuple[float, str | None]:
    """(reward, None), or (0.0, the traceback) where it raises or returns no finite number. `reward` None: the example's
    own."""
    try:
        if reward is None:
            return REWARDS[example.reward](completion, example.answer), None
        value = reward(completion, example.answer, example.row)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise TypeError(f"the reward returned {repr(value)[:80]}; it must return a finite number")
        return float(value), None
    except Exception:
        return 0.0, traceback.format_exc()
