"""rewards.py: what a reward must refuse, however the text is dressed, and what a failing reward function does."""

import math
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from data import Example
from rewards import RewardError, exact_reward, gsm8k_reward, number_reward, resolve_reward

HUGE = 10_000_000  # characters


def example(i: int = 0, text: str = "2 + 2?", reward: str = "number") -> Example:
    return Example(f"made:{i}", [{"role": "user", "content": text}], "4", reward, {"n": i})


MARKED = [  # inside \boxed{} or after ####: (text, gold, right)
    ("342", "342", True),
    ("+342", "342", True),
    ("342.", "342", True),
    ("$342", "342", True),
    (r"\$342", "342", True),
    ("$342$", "342", True),
    ("-$5", "-5", True),
    ("$-5", "-5", True),
    ("50%", "50", True),
    (r"50\%", "50", True),
    ("342 dollars", "342", True),
    ("342 square feet.", "342", True),
    (r"342\text{ dollars}", "342", True),
    (r"342 \text{cm}.", "342", True),
    (r"\text{342}", "342", True),
    ("1,234", "1234", True),
    ("1234", "1,234", True),
    ("1{,}234,567", "1234567", True),
    ("12.0", "12", True),
    ("12", "12.00", True),
    (".5", "0.5", True),
    ("007", "7", True),
    ("0", "-0", True),
    ("\N{MINUS SIGN}288", "-288", True),
    ("0.1", "0.10000000000000000001", False),
    ("9007199254740993", "9007199254740992", False),  # equal as floats
    ("-288", "288", False),
    ("288", "-288", False),
    ("--288", "288", False),
    ("12,34", "1234", False),
    ("1,2345", "12345", False),
    ("1234,567", "1234567", False),
    ("0,123", "123", False),
    ("1,234", "1.234", False),
    ("1 234", "1234", False),
    ("1e2", "100", False),
    ("1E2", "100", False),
    ("10^2", "100", False),
    ("1+2", "3", False),
    ("3 = 1 + 2", "3", False),
    ("6/2", "3", False),
    ("3 or 4", "3", False),
    ("3, 4", "3", False),
    ("5 million", "5", False),
    ("2 dozens", "2", False),
    ("3 and a half", "3", False),
    ("5cm2", "5", False),
    ("٣", "3", False),
    ("\N{FULLWIDTH DIGIT THREE}", "3", False),
    ("²", "2", False),
    ("1_000", "1000", False),
    ("0x10", "16", False),
    ("inf", "inf", False),
    ("nan", "nan", False),
    ("NaN", "0", False),
    ("", "0", False),
    (".", "0", False),
    ("-", "0", False),
    ("3", "three", False),
    ("0" * 63 + "3", "3", True),
    ("0" * 64 + "3", "3", False),
    ("3", "0" * 64 + "3", False),
]


@pytest.mark.parametrize("text, gold, right", MARKED)
def test_marked_number(text, gold, right):
    for reward in (number_reward, gsm8k_reward):
        assert reward(f"so it is \\boxed{{{text}}}. Done", gold) == right
        assert reward(f"so it is\n#### {text}\n", gold) == right


@pytest.mark.parametrize(
    "completion, number, gsm8k",
    [
        # the whole completion
        ("68", 1, 0),
        ("  68.\n", 1, 0),
        ("$68", 1, 0),
        ("68" + " " * 5_000, 1, 0),
        ("-68", 0, 0),
        ("68 apples", 0, 0),
        ("The answer is 68", 0, 0),
        ("1 2 3 68", 0, 0),
        ("68\n68", 0, 0),
        ("rambling" + " " * 5_000 + "68", 0, 0),
        ("23 + 45", 0, 0),
        ("What is 23 + 45? Answer with a number.", 0, 0),
        ("23 + 45 = 68", 0, 0),
        ("", 0, 0),
        # which mark counts
        (r"\boxed{1} no, \boxed{68}", 1, 1),
        (r"\boxed{68} no, \boxed{1}", 0, 0),
        ("\\boxed{1}\n#### 68", 1, 1),
        ("\\boxed{68}\n#### 1", 0, 0),
        ("#### 68\n\\boxed{1}", 0, 0),
        ("#### 1\n\\boxed{68}", 1, 1),
        (r"#### \boxed{68}", 1, 1),
        (r"\boxed{#### 68}", 0, 0),
        ("#### 68\nthat was easy", 1, 1),
        ("#### 68 #### 69", 0, 0),
        ("#### \n68", 0, 0),
        ("\\boxed{68}\n#### ", 0, 0),
        (r"\boxed{68}, then cut off: \boxed{6", 1, 1),
        # braces
        (r"\boxed{\boxed{68}}", 1, 1),
        (r"\boxed{{68}}", 0, 0),
        (r"\boxed{\text{68}}", 1, 1),
        (r"\boxed{68", 0, 0),
        ("boxed{68}", 0, 0),
        ("} \\boxed{68} {", 1, 1),
        (r"\boxed{68\}}", 0, 0),
        (r"\boxed{}", 0, 0),
        (r"\boxed{23+45}", 0, 0),
        # only the end is searched
        (r"\boxed{68}" + "x" * 3_000, 1, 1),
        (r"\boxed{68}" + "x" * 4_000, 0, 0),
    ],
)
def test_where_the_answer_is(completion, number, gsm8k):
    assert (number_reward(completion, "68"), gsm8k_reward(completion, "68")) == (number, gsm8k)


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("Paris", "Paris", True),
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("It is Paris", "Paris", False),
        (r"It is \boxed{ Paris }", "Paris", True),
        ("Let me see\n#### Paris", "Paris", True),
        (r"\boxed{Paris} or \boxed{Rome}", "Paris", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        ("1.0", "1", False),
        ("", "Paris", False),
    ],
)
def test_exact_reward(completion, answer, right):
    assert exact_reward(completion, answer) == right


@pytest.mark.parametrize(
    "hostile",
    [
        r"\boxed{" * (HUGE // 7),
        r"\boxed{" * (HUGE // 14) + "7" + "}" * (HUGE // 14),
        r"\text{" * (HUGE // 6),
        "{" * HUGE,
        "}" * HUGE,
        "#" * HUGE,
        "$" * HUGE,
        "9" * HUGE,
        "1,234" * (HUGE // 5),
        " 1" * (HUGE // 2),
        " " * HUGE + "x",
        "9**" * (HUGE // 3) + "9",
        r"\boxed{" + "9^" * 1_500 + "9}",
        r"\boxed{5" + " a" * 28 + "!}",
        r"\boxed{" + " " * 3_000 + "!}",
        "#### " + "1" * 3_000,
        "\x00\ud800\N{MINUS SIGN}" * 1_000,
    ],
    ids=lambda s: s[:12].encode("unicode_escape").decode(),
)
def test_hostile_completions_are_cheap_and_wrong(hostile):
    for reward in (number_reward, gsm8k_reward, exact_reward):
        seconds = []
        for _ in range(3):  # the best of three, since the machine may be shared
            start = time.perf_counter()
            assert reward(hostile, "5") == 0.0
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05


@given(st.text(alphabet="0123456789.,+-$% \\{}#boxedtTa\N{MINUS SIGN}٣\n", max_size=80) | st.text(max_size=80))
@settings(max_examples=300, deadline=None, database=None)
def test_fuzz_answer_parser(text):
    for reward in (number_reward, gsm8k_reward, exact_reward):
        assert reward(text, "5") in (0.0, 1.0)
        assert reward("5", text) in (0.0, 1.0)
    value = rewards.parse_number(text)
    assert value is None or value.is_finite()
    if gsm8k_reward(text, "5"):
        assert "\\boxed{" in text or "####" in text


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
@settings(max_examples=200, deadline=None, database=None)
def test_fuzz_numbers_survive_their_formats(value):
    for shown in (f"{value:f}", f"{value:,f}", f"${value:f}$", f"{value:f} dollars", f"{value:+f}."):
        assert rewards.parse_number(shown) == value
    assert gsm8k_reward(f"\\boxed{{{value:,f}}}", f"{value:f}") == 1.0
    assert gsm8k_reward(f"\\boxed{{{value:,f}}}", f"{value + Decimal('0.001'):f}") == 0.0


# ---- user rewards ----

USER = """
from dataclasses import dataclass

@dataclass
class Weights:
    right: float = 0.5

def reward(completion, answer, row):
    return Weights().right * (completion == answer) + row["n"]

constant = 3
"""


def test_reward_file(tmp_path):
    assert resolve_reward(None) is None
    (tmp_path / "mine.py").write_text(USER)
    mine = resolve_reward(f"{tmp_path}/mine.py:reward")
    assert rewards.score(mine, example(2), "4") == (2.5, None)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("mine.py", ["file.py:function"]),
        ("mine.py:", ["file.py:function"]),
        (":reward", ["file.py:function"]),
        ("", ["file.py:function"]),
        ("mine.txt:reward", ["file.py:function"]),
        ("gone.py:reward", ["no such file", "gone.py"]),
        ("mine.py:gone", ["'gone' is not there", "def gone(completion, answer, row)"]),
        ("mine.py:constant", ["'constant' is not callable"]),
        ("broken.py:reward", ["SyntaxError"]),
        ("raises.py:reward", ["ZeroDivisionError"]),
    ],
)
def test_bad_reward_specs(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "broken.py").write_text("def reward(:")
    (tmp_path / "raises.py").write_text("1 / 0")
    with pytest.raises(RewardError) as error:
        resolve_reward(spec)
    for word in [f"--reward {spec}", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("name, right, wrong", [("number", "4", "5"), ("gsm8k", "#### 4", "4"), ("exact", "4", "4.0")])
def test_score_uses_the_rows_own_reward(name, right, wrong):
    assert [rewards.score(None, example(reward=name), text) for text in (right, wrong)] == [(1.0, None), (0.0, None)]


def test_an_error_is_0_and_its_traceback():
    def reward(completion, answer, row):
        raise RuntimeError(f"broken on {completion}")

    value, problem = rewards.score(reward, example(), "one")
    assert value == 0.0 and "Traceback" in problem and "broken on one" in problem


@pytest.mark.parametrize(
    "value, score, errors",
    [
        (1, 1.0, 0),
        (True, 1.0, 0),
        (-0.5, -0.5, 0),
        (math.nan, 0.0, 1),
        (math.inf, 0.0, 1),
        (10**400, 0.0, 1),
        (None, 0.0, 1),
        ("1", 0.0, 1),
        ([1.0], 0.0, 1),
        (1 + 0j, 0.0, 1),
    ],
)
def test_score_takes_finite_numbers_only(value, score, errors):
    found, problem = rewards.score(lambda completion, answer, row: value, example(), "x")
    assert (found, problem is not None) == (score, bool(errors))


def test_score_takes_numpy_scalars_and_lets_an_interrupt_through():
    import numpy

    assert rewards.score(lambda *_: numpy.float32(0.5), example(), "x") == (0.5, None)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.score(interrupted, example(), "x")
