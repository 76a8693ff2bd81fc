"""Rewards: 1.0 or 0.0 from a completion and its ground truth, parsed and never evaluated; and a user's own function.

Which reward a row gets is data.py's choice (`Example.reward`, a key of `REWARDS`), unless --reward names another. So is
where a completion says its answer, since the prompt asks for it (`Example.marker`, a key of `answers.MARKERS`).
math-verify is the one reward that evaluates, and may take any time: it belongs into reward_pool.py's processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from answers import LATEX_TEXT, LONGEST_ANSWER, MARKERS, NOT_A_UNIT, is_whole, parse_number, parse_value, unwrapped

if TYPE_CHECKING:
    from data import Example


class RewardError(ValueError):
    """A --reward that cannot be used; the message names the file or function and the fix."""


MATH_VERIFY = "math-verify==0.9.0 antlr4-python3-runtime==4.13.2"
_DEEPEST_ANSWER = 10  # brackets in brackets: the time to parse them grows fast
_NOT_EQUAL = re.compile(r"\\(?:not|neq?|approx|sim|simeq|cong|equiv)(?![a-z])|[≈≠]|\bnot\b", re.IGNORECASE)
_HUGE_POWER = re.compile(r"[0-9] ?[eE] ?[+-]?[0-9]{3}|\^ ?\{? ?[+-]?[0-9]{5}")  # math-verify would work it out


# ---- strict rewards ----


def _same_number(text: str, answer: str, unit: bool = True) -> float:
    value = parse_number(text, unit)
    return float(value is not None and value == parse_number(answer))


def gsm8k_reward(completion: str, answer: str, marker: str = "box") -> float:
    """1.0 if the last `\\boxed{x}` or `#### x` (what `marker` says) is the number `answer`; without a mark, 0.0."""
    marked = MARKERS[marker](completion)
    return 0.0 if marked is None else _same_number(marked, answer)


def number_reward(completion: str, answer: str, marker: str = "box") -> float:
    """As `gsm8k_reward`; without box or `####` the whole completion must be the number and nothing else."""
    marked = MARKERS[marker](completion)
    if marked is None and marker == "box":
        return _same_number(completion.strip(), answer, unit=False)
    return 0.0 if marked is None else _same_number(marked, answer)


def exact_reward(completion: str, answer: str, marker: str = "box") -> float:
    """1.0 if the last `\\boxed{x}` or `#### x`, or without either the whole completion, is `answer`, stripped."""
    marked = MARKERS[marker](completion)
    if marked is None and marker == "box":
        marked = completion
    return float(marked is not None and marked.strip() == answer.strip())


# ---- mathematics ----


def _is_number(answer: str) -> bool:
    """Whether `answer` needs no math-verify; x = 3 does, since y = 3 is another answer."""
    return "=" not in answer and parse_value(answer) is not None


def _same_value(text: str, answer: str) -> float:
    """Exactly equal, where 50% is also 0.5 if only one of the two has the sign."""
    value, gold = parse_value(text), parse_value(answer)
    if value is None:
        return 0.0
    if "%" in text and "%" not in answer:
        return float(gold in (value, value / 100))
    if "%" in answer and "%" not in text:
        return float(value in (gold, gold / 100))
    return float(value == gold)


def math_verify_reward(completion: str, answer: str, marker: str = "box") -> float:
    """1.0 if the marked answer is `answer`: exactly, where that is a number (`parse_value`), else by math-verify.

    math-verify alone would be fooled: it takes 1 + 2 for 3, so the question itself, and 3 \\text{ or 4} and 3, 3 for 3.
    So numbers are not its business, it sees the marked text alone, and not even that where it holds words that
    change the value, or arithmetic that `answer` does not hold. It may take any time, and its own limit works in a main
    thread only: the caller needs one. Raises ValueError for an `answer` that math-verify cannot read, and what
    math-verify raises.
    """
    marked = MARKERS[marker](completion)
    if marked is None:
        return 0.0
    marked, answer = unwrapped(marked), unwrapped(answer)
    if _is_number(answer):
        return _same_value(marked, answer)
    if marked == answer:
        return 1.0
    if not _can_be_compared(marked, answer):
        return 0.0
    math_verify = _math_verify()
    parsed_answer = _parse_latex(answer)
    if not parsed_answer:
        raise ValueError(f"math-verify cannot read the ground truth {answer!r}")
    parsed = _parse_latex(marked)
    if not parsed or _work_left(parsed[0]) > _work_left(parsed_answer[0]):
        return 0.0
    return float(math_verify.verify(parsed_answer, parsed, timeout_seconds=None, raise_on_error=True))


def _can_be_compared(text: str, answer: str) -> bool:
    """False for what math-verify reads as less than it says, or cannot read in reasonable time."""
    words = {word.lower() for word in NOT_A_UNIT.findall(text) + _NOT_EQUAL.findall(text)}
    allowed = {word.lower() for word in NOT_A_UNIT.findall(answer) + _NOT_EQUAL.findall(answer)}
    if "," in answer or "\\pm" in answer:  # several values
        allowed |= {"and", "or"}
    asides = [content for content in LATEX_TEXT.findall(text) if re.search(r"[^A-Za-z .'()-]", content)]
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{}\])]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return (
        0 < len(text) <= LONGEST_ANSWER
        and deepest <= _DEEPEST_ANSWER
        and is_whole(text)
        and "boxed" not in text
        and (_HUGE_POWER.search(text) is None or _HUGE_POWER.search(answer) is not None)
        and words <= allowed
        and all(aside in answer for aside in asides)
    )


def _parse_latex(text: str) -> list:
    """[SymPy expression], not evaluated; [] for what math-verify cannot read."""
    math_verify = _math_verify()
    box = math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}
    return math_verify.parse(f"\\boxed{{{text}}}", [box], **options)


def _work_left(expression) -> int:
    """Operations on numbers alone that are written and not done: 1 + 2, 2 * 3, 2^{10}, 3!, sums, integrals, limits."""
    import sympy

    undone = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative, sympy.factorial, sympy.binomial)
    if not isinstance(expression, sympy.Basic):  # a matrix
        return 0
    left = 0
    for node in sympy.preorder_traversal(expression):
        plain = [arg for arg in node.args if isinstance(arg, sympy.Number)]
        power = isinstance(node, sympy.Pow) and len(plain) == 2 and node.exp.is_Integer and node.exp != -1
        left += isinstance(node, undone) or power or (isinstance(node, (sympy.Add, sympy.Mul)) and len(plain) > 1)
    return left


def _math_verify():
    """The package. Raises RewardError with what to install."""
    try:
        module = importlib.import_module("math_verify")
    except ImportError as error:
        raise RewardError(
            f"math-verify is needed for ground truths that are not plain numbers ({error}): pip install {MATH_VERIFY}; "
            "or choose another --reward"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that the time limit is the caller's
    return module


REWARDS = {
    "number": number_reward,
    "gsm8k": gsm8k_reward,
    "exact": exact_reward,
    "math-verify": math_verify_reward,
}


def required_modules(spec: str | None, examples: Iterable[Example]) -> list[str]:
    """Modules that scoring `examples` with `--reward spec` imports, all of them imported here once. Raises RewardError
    with the command that installs one that is missing."""
    if spec is None:
        needed = any(e.reward == "math-verify" and not _is_number(unwrapped(e.answer)) for e in examples)
    else:
        needed = spec == "math-verify"
    return [_math_verify().__name__] if needed else []


def check_reward(spec: str | None) -> None:
    """RewardError for what can be seen to be wrong with --reward without running a line of the user's file."""
    if spec is None or spec in REWARDS:
        required_modules(spec, ())
        return
    path, _ = _file_and_name(spec)
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise RewardError(f"--reward {spec}: {path} cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise RewardError(f"--reward {spec}: {path} is no Python ({type(error).__name__}: {error})") from None


def _file_and_name(spec: str) -> tuple[Path, str]:
    file, _, name = spec.rpartition(":")
    if not name or not file.endswith(".py"):
        raise RewardError(f"--reward {spec[:200]}: give file.py:function, or one of {', '.join(REWARDS)}")
    try:
        path = Path(file).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user that there is not
        raise RewardError(f"--reward {spec[:200]}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise RewardError(f"--reward {spec}: no such file: {path}")
    return path, name


def resolve_reward(spec: str | None) -> Callable[[str, str, dict], float] | str | None:
    """The function that `--reward file.py:function` names, called as function(completion, answer, row) -> float.

    A key of `REWARDS` stays as it is, and so does None: every row's own reward. It runs the user's file, so the trainer
    leaves it to reward_pool.py's processes. Raises RewardError for a file or function that cannot be used, and for a
    package that is missing.
    """
    check_reward(spec)
    if spec is None or spec in REWARDS:
        return spec
    path, name = _file_and_name(spec)
    module_spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"--reward {spec}: importing {path} failed ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    problem = None if hasattr(module, name) else "is not there"
    if problem is None:
        problem = "is not callable" if not callable(function) else _not_a_reward(function)
    if problem:
        raise RewardError(f"--reward {spec}: '{name}' {problem} in {path}; define def {name}(completion, answer, row)")
    return function


def _not_a_reward(function: Callable) -> str | None:
    """Why a callable cannot be called as function(completion, answer, row) for a number; None if it may be one."""
    if inspect.iscoroutinefunction(function):
        return "is async"
    try:
        inspect.signature(function).bind("completion", "answer", {})
    except TypeError as error:
        return f"does not take (completion, answer, row): {error},"
    except ValueError:  # of a builtin, which does not tell
        return None
    return None


def score(
    reward: Callable[[str, str, dict], float] | str | None, example: Example, completion: str
) -> tuple[float, str | None]:
    """(reward, None), or (0.0, the traceback) where it raises or returns no finite number. `reward`: a user's function,
    a key of `REWARDS`, or None for the example's own."""
    try:
        if reward is None or isinstance(reward, str):
            return REWARDS[reward or example.reward](completion, example.answer, example.marker), None
        value = reward(completion, example.answer, example.row)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise TypeError(f"the reward returned {repr(value)[:80]}; it must return a finite number")
        return float(value), None
    except Exception:
        return 0.0, traceback.format_exc()
