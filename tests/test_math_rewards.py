"""Rewards of mathematics: a last line "Answer: X", math-verify on a table beside what it says alone, its time limit.

Golds that are numbers never reach math-verify; where ours and upstream differ, the table says so.
"""

import builtins
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import rewards
from data import Example
from reward_pool import RewardPool
from rewards import RewardError, exact_reward, gsm8k_reward, math_verify_reward, number_reward

HUGE = 1_000_000  # characters


def example(i=0, answer="34", reward="math-verify", marker="answer-line"):
    return Example(f"made:{i}", [{"role": "user", "content": "?"}], answer, reward, {}, marker)


# ---- the line "Answer: X"


@pytest.mark.parametrize(
    "completion, right",
    [
        ("Answer: 34", 1),
        ("So it is 30 + 4.\n\nAnswer: 34", 1),
        ("Answer: 34\n\n  \n", 1),
        ("Answer: $34", 1),
        ("Answer: $34$", 1),
        ("Answer: $34$.", 1),
        (r"Answer: \(34\)", 1),
        (r"Answer: \boxed{34}", 1),
        (r"Answer: $\boxed{34}$.", 1),
        ("**Answer:** 34", 1),
        ("**Answer**: 34", 1),
        ("**Answer: 34**", 1),
        ("**Answer:** **34**", 1),
        ("answer : 34", 1),
        ("Answer:34", 1),
        ("Answer: 1\nAnswer: 34", 1),
        ("Answer: 34 apples", 1),
        ("Answer: 34\nAnswer: 1", 0),
        ("Answer: 34\nI hope that helps.", 0),  # it is not the last line
        ("Answer: 34\n\\boxed{34}", 0),
        (r"\boxed{34}", 0),
        ("#### 34", 0),
        ("34", 0),
        ("The answer is 34", 0),
        ("The answer: 34", 0),
        ("Answer 34", 0),
        ("Answer:", 0),
        ("Answer:\n34", 0),
        ("Answer: $Answer", 0),
        ("Answer: Answer: 34", 0),
        ("Answer: 34 Answer: 35", 0),
        ("Answer: 1 or 34", 0),
        ("Answer: 34 or 1", 0),
        ("Answer: 34, 35", 0),
        ("Answer: 30 + 4", 0),
        ("Answer: 68/2", 0),
        ("Answer: -34", 0),
        ("Answer: 34 million", 0),
        ("Answer: 34 (since 30 + 4 = 34)", 0),
        (r"Answer: \boxed{1} \boxed{34}", 0),
        ("Answer: $1$ and $34$", 0),
        ("", 0),
    ],
)
def test_answer_line(completion, right):
    for reward in (number_reward, gsm8k_reward, math_verify_reward):
        assert reward(completion, "34", "answer-line") == right


def test_the_marker_is_the_rows_and_not_guessed():
    for reward in ("number", "gsm8k", "exact", "math-verify"):
        line, box = (example(reward=reward, marker=marker) for marker in ("answer-line", "box"))
        for text, of_line, of_box in [("Answer: 34", 1.0, 0.0), (r"\boxed{34}", 0.0, 1.0)]:
            assert rewards.score(None, line, text) == (of_line, None)
            assert rewards.score(None, box, text) == (of_box, None)
            assert rewards.score(reward, line, text) == (of_line, None), "--reward NAME keeps the row's marker"
    assert exact_reward("Answer: **blue**", "blue", "answer-line") == 1.0
    assert exact_reward("blue", "blue", "answer-line") == 0.0


# ---- math-verify, beside upstream: (marked answer, gold, ours, upstream)

BOTH = [
    # fractions, decimals, percent
    ("1/2", r"\frac{1}{2}", True),
    (r"\frac12", r"\frac{1}{2}", True),
    (r"\dfrac{2}{4}", r"\frac{1}{2}", True),
    ("0.5", r"\frac{1}{2}", True),
    ("11/2", r"1\frac12", False),
    (r"1\frac{1}{2}", r"\frac32", True),
    ("0.333", r"\frac13", False),
    (r"50\%", r"\frac{1}{2}", True),
    (r"50\%", "50", True),
    ("0.5", "50%", True),
    # units, thousands, money, degrees
    (r"10 \text{ cm}", "10", True),
    ("10 cm^2", "10", False),
    ("3 apples", "3", True),
    ("5 million", "5", False),
    ("1,000", "1000", True),
    ("1{,}000", "1000", True),
    (r"\$3", "3", True),
    (r"90^\circ", "90", True),
    # roots, powers, scientific
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("2sqrt(3)", r"2\sqrt{3}", True),
    (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}", True),
    (r"3 \times 10^5", "300000", True),
    ("3e5", "300000", False),
    ("1024", "2^{10}", True),
    ("4^5", "2^{10}", True),
    # signs and size
    ("-3", "3", False),
    ("-3", "-3", True),
    (r"-1\frac12", "-1.5", True),
    ("9007199254740993", "9007199254740992", False),
    ("1" + "0" * 40 + "1", "1" + "0" * 41, False),
    ("1000000.0000001", "1000000", False),
    # intervals, sets, tuples
    ("(1,2)", "(1,2)", True),
    ("(1,2)", "[1,2]", False),
    ("(2,1)", "(1,2)", False),
    ("(1,2,3)", "(1,2,3)", True),
    (r"(-\infty,3) \cup (4,5]", r"(4,5]\cup(-\infty,3)", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("1,2", r"\{2,1\}", True),
    ("1 or 2", "1,2", True),
    ("x=1 or x=2", "1,2", True),
    ("1 or 2", "1", False),
    ("1 or 2", "2", False),
    (r"\sqrt{2} \text{ or } 3", r"\sqrt{2}", False),
    ("3", r"\pm 3", False),
    # equations, expressions, words
    ("x = 3", "3", True),
    ("m+n = 3", "3", True),
    ("3", "x=3", True),
    ("y = 3", "x=3", False),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\text{Even}", "even", True),
    (r"\text{(A)}", "A", True),
    (r"\text{even}", r"\text{odd}", False),
    # garbage
    ("", "3", False),
    (r"garbage $$ \frac{", "3", False),
    ("three", "3", False),
    (r"\frac{1}{0}", r"\infty", False),
]
OURS_IS_STRICTER = [  # upstream says True to all of these
    ("1+2", "3"),
    ("6/2", "3"),
    (r"12 \div 4", "3"),
    (r"\frac{3}{1}", "3"),
    ("2^{10}", "1024"),
    ("3!", "6"),
    (r"\log_2 8", "3"),
    (r"\sqrt[3]{27}", "3"),
    (r"\sum_{i=1}^{2} i", "3"),
    (r"\int_0^1 x dx", r"\frac12"),
    (r"1+\frac13", r"\frac43"),
    ("(1, 1+1)", "(1,2)"),
    ("2x = 3", "3"),
    ("3 = 4", "4"),
    ("x = 1 + 2", "3"),
    ("3,3,3", "3"),
    (r"3 \text{ million}", "3"),
    (r"3 \text{ (or 4)}", "3"),
    (r"3\text{, not 4}", "3"),
    (r"3 \approx 4", "3"),
    (r"\sqrt2 \approx 1.41", r"\sqrt2"),
    (r"3_{10}", "3"),
    ("0.333333", r"\frac13"),
]
OURS_KNOWS_MORE = [(r"1\,000", "1000"), ("1000", r"1\,000")]
TABLE = [(text, gold, ours, ours) for text, gold, ours in BOTH]
TABLE += [(text, gold, False, True) for text, gold in OURS_IS_STRICTER]
TABLE += [(text, gold, True, False) for text, gold in OURS_KNOWS_MORE]


@pytest.mark.parametrize("text, gold, ours, upstream", TABLE)
def test_against_upstream(text, gold, ours, upstream):
    math_verify = pytest.importorskip("math_verify")
    read = [math_verify.parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (gold, text)]
    assert math_verify.verify(*read, timeout_seconds=None) == upstream, "upstream has changed: read the table again"
    assert math_verify_reward(f"It is \\boxed{{{text}}}.", gold) == ours
    assert math_verify_reward(f"It is\nAnswer: {text}", gold, "answer-line") == ours
    assert math_verify_reward(f"It is\nAnswer: ${text}$", gold, "answer-line") == ours


def test_a_gold_that_cannot_be_read_is_an_error_and_not_a_wrong_answer():
    pytest.importorskip("math_verify")
    value, problem = rewards.score(None, example(answer=r"\frac{1"), "Answer: 2")
    assert value == 0.0 and r"cannot read the ground truth '\\frac{1'" in problem


@pytest.mark.parametrize("answer", ["34", "1,234", "-2.5", r"\frac{1}{2}", "$7$", "50%"])
def test_a_gold_that_is_a_number_needs_no_package(monkeypatch, answer):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert rewards.required_modules(None, [example(answer=answer)]) == []
    assert math_verify_reward(f"Answer: {answer}", answer, "answer-line") == 1.0
    assert math_verify_reward(r"Answer: \sqrt{2}", answer, "answer-line") == 0.0


@pytest.mark.parametrize("spec, answer, needed", [
    (None, r"\sqrt{2}", True), (None, "x = 3", True), (None, "(1, 2)", True), (None, "3", False),
    ("math-verify", "3", True), ("number", r"\sqrt{2}", False), ("mine.py:f", r"\sqrt{2}", False),
])  # fmt: skip
def test_which_runs_need_the_package(spec, answer, needed):
    pytest.importorskip("math_verify")
    assert rewards.required_modules(spec, [example(answer="1"), example(answer=answer)]) == ["math_verify"] * needed


def test_a_missing_package_is_one_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for fails in (
        lambda: rewards.resolve_reward("math-verify"),
        lambda: rewards.required_modules(None, [example(answer="x + 1")]),
        lambda: RewardPool("math-verify", 1, 1.0),
    ):
        with pytest.raises(RewardError, match=r"pip install math-verify==0\.9\.0 antlr4-python3-runtime==4\.13\.2"):
            fails()


def test_the_command_is_what_the_requirements_pin():
    root = Path(rewards.__file__).parent
    gpu, cpu = (set((root / name).read_text().splitlines()) for name in ("requirements.txt", "requirements-cpu.txt"))
    assert set(rewards.MATH_VERIFY.split()) <= gpu & cpu
    assert "latex2sympy2_extended==1.11.0" in cpu, "what math-verify asks for; this list is installed with --no-deps"


def test_a_number_never_imports_sympy(monkeypatch):
    real = builtins.__import__

    def no_sympy(name, *arguments, **named):
        assert name != "sympy"
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", no_sympy)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert math_verify_reward("Answer: 10^{10^{10}}", "34", "answer-line") == 0.0


# ---- hostile


@pytest.mark.parametrize(
    "hostile",
    [
        "Answer: " + "9" * HUGE,
        "Answer: " + "$" * HUGE,
        "Answer: " + r"\boxed{" * (HUGE // 7),
        "Answer:" * (HUGE // 7),
        "**" * (HUGE // 2),
        "Answer: " + "a+" * 148 + "=",
        "Answer: " + "a + " * 70 + "1",
        "Answer: " + r"\frac" * 60,
        "Answer: " + "1 " * 149,
        "Answer: " + "{" * 140 + "3" + "}" * 140,
        "Answer: " + "(" * 140 + "3" + ")" * 140,
        "Answer: " + r"10^{10^{10^{10}}}",
        "Answer: 10**10**10",
        "Answer: " + "9" * 290,
        "\n" * HUGE + "x",
        "Answer: " + " " * HUGE + "x",
    ],
    ids=lambda s: s[:20].encode("unicode_escape").decode(),
)
def test_hostile_answers_to_a_number_are_cheap_and_wrong(hostile):
    for reward in (number_reward, exact_reward, math_verify_reward):
        seconds = []
        for _ in range(3):  # the best of three, since the machine may be shared
            start = time.perf_counter()
            assert reward(hostile, "5", "answer-line") == 0.0
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05


BOMBS = [r"(x+y+z)^{300}", r"\cos(10^{10^{8}} \pi)", r"e^{10^{10^{10}}}", r"\sqrt{9^{9^{9^9}}+x}"]


def test_bombs_end_at_the_time_limit_and_the_rest_is_scored():
    """math-verify would evaluate these for minutes: their process is killed, counted, and replaced."""
    pytest.importorskip("math_verify")
    gold = r"9^{9^{9^{9}}} + \sqrt{2}"  # as much arithmetic as the bombs hold, so that they reach math-verify
    with RewardPool(None, 2, 2.0, ["math_verify"]) as pool:
        start = time.monotonic()
        for i, bomb in enumerate(BOMBS):
            pool.submit(i, example(i, gold), f"Answer: {bomb}")
            pool.submit(100 + i, example(i, r"\sqrt{12}"), r"Answer: $2\sqrt{3}$")
            pool.submit(200 + i, example(i, r"\sqrt{12}"), r"Answer: $3\sqrt{2}$")
        found = pool.collect()
        assert time.monotonic() - start < 30
        assert [found[i] for i in range(len(BOMBS))] == [0.0] * len(BOMBS)
        assert [found[100 + i] for i in range(len(BOMBS))] == [1.0] * len(BOMBS)
        assert [found[200 + i] for i in range(len(BOMBS))] == [0.0] * len(BOMBS)
        assert pool.timeouts >= 2 and pool.errors == pool.timeouts


@pytest.mark.parametrize("spec, modules", [(None, ["math_verify"]), ("math-verify", [])])
def test_the_pool_scores_both_markers(spec, modules):
    pytest.importorskip("math_verify")
    with RewardPool(spec, 1, 10.0, modules) as pool:
        pool.submit(0, example(0, "(1, 2)"), "Answer: (1,2)")
        pool.submit(1, example(1, "(1, 2)", marker="box"), r"\boxed{(1,2)}")
        pool.submit(2, example(2, "(1, 2)"), r"\boxed{(1,2)}")
        assert pool.collect() == {0: 1.0, 1: 1.0, 2: 0.0}
        assert (pool.errors, pool.timeouts) == (0, 0)


def test_modules_are_imported_before_the_first_reward_and_outside_its_limit(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RewardPool(None, 1, 0.5, ["slow_to_import"]) as pool:
        pool.submit(0, example(), "Answer: 34")
        assert pool.collect() == {0: 1.0} and pool.timeouts == 0
    with pytest.raises(RewardError, match="not_there"):
        RewardPool(None, 1, 0.5, ["not_there"])


@given(st.text(alphabet="0123456789.,+-$% \\{}()[]=^_/*answerAnswer:fracboxtmd\n", max_size=80) | st.text(max_size=80))
@settings(max_examples=300, deadline=None, database=None)
def test_fuzz_numbers(text):
    value = answers.parse_value(text)
    assert value is None or answers.parse_value(f"${text}$") in (value, None)
    assert math_verify_reward(f"Answer: {text}", "34", "answer-line") in (0.0, 1.0)


@given(st.fractions(max_denominator=999, min_value=-999, max_value=999))
@settings(max_examples=200, deadline=None, database=None)
def test_fuzz_fractions_survive_their_formats(value):
    sign, n, d = "-" if value < 0 else "", abs(value.numerator), value.denominator
    shown = (
        [f"{sign}{n}"] if d == 1 else [f"{sign}{n}/{d}", f"{sign}\\frac{{{n}}}{{{d}}}", f"\\dfrac{{{sign}{n}}}{{{d}}}"]
    )
    if d > 1 and n > d:
        shown.append(f"{sign}{n // d}\\frac{{{n % d}}}{{{d}}}")
    for text in shown:
        assert answers.parse_value(text) == answers.parse_value(f"x = ${text}$") == value
        assert math_verify_reward(f"Answer: {text}", shown[0], "answer-line") == 1.0
    assert math_verify_reward(f"Answer: {n + d}/{d}", shown[0], "answer-line") == (value == (n + d) / d)
