"""The answer of a completion: where it stands, and the number that it is. Text is parsed and never evaluated."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_TAIL = 4_000  # characters at a completion's end that are searched for the answer
_LONGEST_NUMBER = 64  # characters
_BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
_NUMBER = re.compile(  # after spaces are single; every part is bounded or unambiguous, so matching is linear
    r"\${0,2} ?(?P<sign>[+-]?) ?\${0,2} ?(?P<digits>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r" ?(?:\\?%)?(?P<unit>(?: [A-Za-z]+)*) ?\.?\${0,2}\.?"
)
_ANSWER_LINE = re.compile(r"(?:\*\*)?answer(?:\*\*)? ?:(?:\*\*)?(?P<answer>.*)", re.IGNORECASE)
_LONGEST_LINE = 1_000  # characters
LONGEST_ANSWER = 300  # characters; the longest of MATH-500 has 159
_WRAPPERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"))
_DIGIT_GROUP = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")  # 1\,000
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_DEGREES = re.compile(r" ?(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|°)$")
_NAME = r"(?:[A-Za-z]{1,3}|\\[a-z]{2,8})(?:_(?:\w|\{\w{1,8}\})|\(\w{1,8}\))?"
_ASSIGNED = re.compile(rf"^(?:{_NAME} ?\+ ?)*{_NAME} ?= ?")  # x =, m + n =, S_{ABC} =, f(2) =
_SCIENTIFIC = re.compile(
    r"(?P<digits>[+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?) ?(?:\\times|\\cdot|\N{MULTIPLICATION SIGN}) ?"
    r"10\^ ?(?:\{ ?(?P<exponent>[+-]?[0-9]{1,2}) ?\}|(?P<bare>[0-9]{1,2}))"
)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>[0-9]{1,30}) ?(?=\\|[0-9]{1,30} ?/))??"
    r"(?:(?P<above>[0-9]{1,30}) ?/ ?(?P<below>[0-9]{1,30})"
    r"|\\[dt]?frac ?(?:\{ ?(?P<above_brace>-?[0-9]{1,30}) ?\}|(?P<above_bare>[0-9])) ?"
    r"(?:\{ ?(?P<below_brace>[0-9]{1,30}) ?\}|(?P<below_bare>[0-9])))"
)
NOT_A_UNIT = re.compile(  # words that change the value, or offer a second one
    r"\b(?:hundred|thousand|million|billion|trillion|dozen)s?\b|\b(?:half|point|and|or|plus|minus|over)\b",
    re.IGNORECASE,
)


def parse_number(text: str, unit: bool = True) -> Decimal | None:
    """The one number that `text` is, or None: "-$1,234.50", "50\\%", "342 dollars" (the last only with `unit`)."""
    if len(text) > _LONGEST_NUMBER:
        return None
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("{,}", ",")
    match = _NUMBER.fullmatch(" ".join(LATEX_TEXT.sub(r" \1 ", text).split()))
    if match is None or (match["unit"] and (not unit or NOT_A_UNIT.search(match["unit"]))):
        return None
    return Decimal(match["sign"] + match["digits"].replace(",", ""))


def parse_value(text: str) -> Fraction | None:
    """The number that `text` is when all work is done, or None: for 1 + 2, 6/2, \\sqrt{4}, 1 or 2.

    It is what `parse_number` reads, a fraction or mixed number that is not whole, or a \\times 10^n; with a sign for
    degrees after it, or `x =` before it.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = _DIGIT_GROUP.sub(",", text.replace(",\\!", ",").replace("\N{MINUS SIGN}", "-"))
    text = " ".join(_LATEX_SPACE.sub(" ", text).split())
    text = _DEGREES.sub("", unwrapped(_ASSIGNED.sub("", unwrapped(text), count=1)))
    number = parse_number(text)
    if number is not None:
        return Fraction(number)
    if power := _SCIENTIFIC.fullmatch(text):
        return Fraction(power["digits"]) * Fraction(10) ** int(power["exponent"] or power["bare"])
    parts = _FRACTION.fullmatch(text)
    if parts is None:
        return None
    above = int(parts["above"] or parts["above_brace"] or parts["above_bare"])
    below = int(parts["below"] or parts["below_brace"] or parts["below_bare"])
    if below == 0 or above % below == 0 or (parts["whole"] and not 0 < above < below):
        return None
    value = int(parts["whole"] or 0) + Fraction(above, below)
    return -value if parts["sign"] == "-" else value


# ---- where the answer is ----


def _boxed_answer(completion: str) -> str | None:
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


def unwrapped(text: str) -> str:
    """Without what surrounds all of it: **bold**, $...$, \\(...\\), \\boxed{...}, and a full stop."""
    while True:
        before = text
        text = text.strip()
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if text == left + inner + right and is_whole(inner) and not (left == right and left in inner):
                text = inner
        text = text.removesuffix(".")
        if text == before:
            return text


def is_whole(text: str) -> bool:
    """Whether braces close in it what they open in it, and no $ ends it before its end."""
    depth = 0
    for brace in re.findall(r"\\[{}]|[{}]", text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0 and re.search(r"(?<!\\)\$", text) is None


def _answer_line(completion: str) -> str | None:
    """X of a last line `Answer: X`, without signs around it (`**Answer:** $X$`); None if another line is the last."""
    line = completion.rstrip().rpartition("\n")[2]
    match = _ANSWER_LINE.fullmatch(unwrapped(line)) if len(line) <= _LONGEST_LINE else None
    return None if match is None else unwrapped(match["answer"])


MARKERS = {"box": _boxed_answer, "answer-line": _answer_line}
