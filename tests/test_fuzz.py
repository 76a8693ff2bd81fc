"""Properties of what reads text from outside: files of rows, answers of a model, flags.

Not only that nothing raises: what must be read is read as what it is, and what must not earn a reward does not.
"""

import dataclasses
import io
import json
import math
import re
import time
import typing
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest
import tyro
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import config
import data
import rewards
import train
from alarms import Thresholds
from answers import parse_number, parse_value
from config import Args, ConfigError
from data import DataError, Example, load_data
from rewards import exact_reward, gsm8k_reward, math_verify_reward, number_reward

STRICT = (number_reward, gsm8k_reward, exact_reward)
MARKED = (number_reward, gsm8k_reward, math_verify_reward)  # those that read a number
SECONDS = 0.25  # of processor time, that one strict reward may take for any text


def many(n: int):
    """n examples, the same ones each time."""
    return settings(max_examples=n, deadline=None, database=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip


# ---- answers: a number in any spelling, and nothing but that number

integers = st.integers(-(10**15), 10**15) | st.integers(-99, 99)


def digits(n: int, draw) -> str:
    """|n| in one of the ways that people write an integer."""
    shown = draw(st.sampled_from([f"{abs(n)}", f"{abs(n):,}", f"{abs(n):,}".replace(",", "{,}"), f"00{abs(n)}"]))
    return shown + draw(st.sampled_from(["", ".", ".0", ".000"]))


@st.composite
def spelled(draw, n: int) -> str:
    """An integer as a model may write it into a box."""
    sign = draw(st.sampled_from(["-", "\N{MINUS SIGN}", "- "])) if n < 0 else draw(st.sampled_from(["", "+"]))
    number = digits(n, draw)
    dollar = draw(st.sampled_from(["", "$", r"\$"]))
    text = draw(st.sampled_from([dollar + sign, sign + dollar])) + number
    if not dollar and not number.endswith("."):
        text += draw(st.sampled_from(["", "", "%", r"\%", " apples", r" \text{cm}", r"\mathrm{ kg}", " square feet."]))
    if not dollar:
        left, right = draw(st.sampled_from([("", ""), ("$", "$"), (r"\text{", "}")]))
        text = left + text + right if r"\text" not in text and r"\mathrm" not in text else text
    return draw(st.sampled_from(["", " ", "  "])) + text + draw(st.sampled_from(["", " ", "\n"]))


prose = st.text(alphabet="abcdefg xyz.,;:!?()\n'*-", max_size=40)  # no digit and no mark


@given(st.data(), integers, integers, prose, prose)
@many(200)
def test_a_number_in_any_spelling_is_that_number_and_no_other(given_data, n, other, before, after):
    assume(n != other)
    text = given_data.draw(spelled(n))
    marks = {"box": [f"{before} \\boxed{{{text}}} {after}"], "answer-line": [f"{before}\nAnswer: {text.strip()}"]}
    if "\n" not in text:
        marks["box"].append(f"{before}\n####{text}\n{after}")
    for marker, completions in marks.items():
        for completion in completions:
            for reward in MARKED:
                assert reward(completion, str(n), marker) == 1.0, completion
                assert reward(completion, f"{n:,}", marker) == 1.0, completion
                assert reward(completion, str(other), marker) == 0.0, completion
                assert reward(completion, str(-n), marker) == float(n == 0), completion


SEPARATORS = [" ", "  ", ", ", ",", "{,}", r"\,", "; ", " or ", " and ", " = ", "\n", " | ", r" \text{ or } ", r"\quad",
              "/", " / ", " to ", "-", " - ", ":", "^", "_", "e", " + ", "*", r" \times ", r"\approx ", "$ $", "$, $",
              r"\text{ or }", " not ", " (or ", "%", "\t", "\u2028", "\x00", "\N{MINUS SIGN}"]  # fmt: skip


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(SEPARATORS))
@many(400)
def test_two_answers_in_one_place_are_none(a, b, separator):
    """A model that offers two numbers in one box is not right with either."""
    assume(a != b)
    both = f"{a}{separator}{b}"
    for gold in (str(a), str(b)):
        for completion, marker in [(f"\\boxed{{{both}}}", "box"), (f"It is\n#### {both}", "box"), (both, "box"),
                                   (f"It is\nAnswer: {both}", "answer-line")]:  # fmt: skip
            if "####" in completion and separator == "\n":
                continue  # the line after #### ends with its first number: that is the answer
            for reward in MARKED:
                assert reward(completion, gold, marker) == 0.0, (completion, gold)


junk = st.text(max_size=60) | st.text(alphabet="0123456789.,+-$% \\{}()#boxedtnswrAa:\n", max_size=60)


@given(integers, integers, junk)
@many(500)
def test_what_is_written_after_an_answer_does_not_pay(n, other, tail):
    """Without another mark nothing that follows makes a wrong answer right, or a right one wrong; and an answer that is
    the whole completion stays right only with what is no second answer."""
    assume(n != other and not re.search(r"boxed|####|[{}\\]", tail))
    for reward in MARKED:
        assert reward(f"\\boxed{{{other}}}{tail}", str(n)) == 0.0
        assert reward(f"\\boxed{{{n}}}{tail}", str(n)) == 1.0
        assert reward(f"#### {other}\n{tail}", str(n)) == 0.0
        assert reward(f"#### {n}\n{tail}", str(n)) == 1.0
    plain = number_reward(f"{other}{tail}", str(n))
    assert plain == 0.0 or parse_number((f"{other}{tail}").strip(), unit=False) == n, "it is the number, spelled out"
    if re.search(r"[^\s.%$0-9,]", tail):
        assert number_reward(f"{n}{tail}", str(n)) == 0.0


@given(junk, integers)
@many(500)
def test_a_stricter_reward_is_never_more_generous(text, n):
    """Who passes gsm8k's passes number's, and who passes that by a mark passes the exact part of math-verify's."""
    for completion in (text, f"\\boxed{{{text}}}", f"#### {text}", f"{text}{n}", f"\\boxed{{{text}{n}}}"):
        strict, number, value = (reward(completion, str(n)) for reward in MARKED)
        assert strict in (0.0, 1.0) and number in (0.0, 1.0) and value in (0.0, 1.0)
        assert gsm8k_reward(completion, str(n)) <= number
        assert gsm8k_reward(completion, str(n)) <= value


PIECES = ["\\boxed{", "\\text{", "{", "}", "$", "$$", "**", "\\(", "\\)", "\\[", "\\]", "####", "Answer:", "answer :",
          " ", "\n", "\t", "9", "1,234", "0.", "-", "\N{MINUS SIGN}", "/", "\\frac", "\\frac{1}{", "10^", "9^{", "x = ",
          "\\,", "~", "\\quad", "°", "\\circ", "%", "\\%", "e9", "9**9", "٣", "\u2028", "\x00", "\ud800", "é", "(", ")",
          "hundred ", "and ", "boxed", "\\", "a", "x", "."]  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 3000)), min_size=1, max_size=6),
    st.sampled_from(["", "\\boxed{", "#### ", "Answer: "]),
)
@example([("**", 1000), ("x", 1), ("**", 1000)], "\\boxed{")
@example([("\\(", 900), ("1", 1), ("\\)", 900)], "\\boxed{")
@example([("{", 2000), ("}", 2000)], "\\boxed{")
@many(250)
def test_no_text_takes_long_or_raises(parts, start):
    text = start + "".join(piece * times for piece, times in parts)
    for marker in ("box", "answer-line"):
        for reward in (*STRICT, math_verify_reward):
            assert seconds_of(lambda reward=reward, marker=marker: reward(text, "5", marker)) < SECONDS
    for parse in (parse_number, parse_value):
        assert seconds_of(lambda parse=parse: parse(text)) < SECONDS


def seconds_of(function) -> float:
    """Processor seconds of a call, the best of up to three, since the machine may be shared."""
    best = math.inf
    for _ in range(3):
        start = time.thread_time()
        function()
        best = min(best, time.thread_time() - start)
        if best < SECONDS / 2:
            break
    return best


@given(junk)
@many(500)
def test_what_is_read_as_a_number_is_one_by_another_parser_too(text):
    """A number has a digit, is finite, and is what Python makes of it once the signs around it are gone."""
    number = parse_number(text)
    if number is None:
        return
    plain = re.sub(r"\\text|\\mathrm|[^0-9.+\-\N{MINUS SIGN}]", "", text).replace("\N{MINUS SIGN}", "-").rstrip(".")
    plain = re.sub(r"^([+-]?)\.+(?=\d)", r"\g<1>0.", plain)
    assert Fraction(number) == Fraction(plain)
    assert Fraction(number) == parse_value(text)


# ---- rows: any file is read or refused in one line

ONE_LINE = 1_500  # characters of a message


def refused_or_read(path, split_size: int = 0) -> list[Example] | None:
    """The examples, or None after a DataError in one line that names the file."""
    try:
        return load_data(str(path), None, split_size)[0]
    except DataError as error:
        message = str(error)
        assert message.startswith(str(path)) and len(message.splitlines()) == 1 and len(message) < ONE_LINE, message
        return None


questions = st.text(max_size=40).filter(lambda s: s.strip() and s.isprintable() and "####" not in s)
ROW = {"question": "1 + 1?", "answer": "so\n#### 2"}
STRUCTURED = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7},
}


def parquet_bytes(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with some bytes changed, put in, left out, or its end cut away."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        what = draw(st.sampled_from(["change", "insert", "delete", "cut", "repeat"]))
        if what == "change" and found:
            found[at] = draw(st.integers(0, 255))
        elif what == "insert":
            found[at:at] = draw(st.binary(max_size=8))
        elif what == "delete":
            del found[at : at + draw(st.integers(1, 20))]
        elif what == "cut":
            del found[at:]
        else:
            found[at:at] = found[at : at + 50]
    return bytes(found)


LINES = "\n".join(json.dumps(row) for row in (ROW, STRUCTURED | ROW, ROW)).encode()
FILES = {".jsonl": LINES, ".json": json.dumps([ROW, ROW]).encode(), ".parquet": parquet_bytes([STRUCTURED] * 3)}


@pytest.mark.parametrize("suffix", FILES)
@given(st.data())
@many(150)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, suffix, given_data):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(given_data.draw(st.binary(max_size=60) | damaged(FILES[suffix])))
    for e in refused_or_read(path) or ():
        assert e.messages and e.answer.strip() == e.answer != ""
        assert all(m["role"].strip() and m["content"].strip() for m in e.messages)


@st.composite
def good_rows(draw):
    """(row, prompt's text, gold) in one of the layouts, with a gold that is an integer."""
    question, gold = draw(questions), draw(integers)
    shown = draw(st.sampled_from([str(gold), f"{gold:,}", f" {gold} "]))
    layout = draw(st.sampled_from(["verl", "skyrl", "gsm8k", "plain"]))
    if layout == "gsm8k":
        return {"question": question, "answer": f"Some steps.\n#### {shown}"}, question, gold
    if layout == "plain":
        return {draw(st.sampled_from(["question", "prompt"])): question, "answer": shown}, question, gold
    column = "reward_model" if layout == "verl" else "reward_spec"
    source = draw(st.sampled_from(["openai/gsm8k", "mine", None]))
    messages = [{"role": "system", "content": "Be brief."}] if draw(st.booleans()) else []
    messages.append({"role": "user", "content": question})
    return {"prompt": messages, column: {"ground_truth": shown}, "data_source": source}, question, gold


@given(good_rows())
@many(120)
def test_a_good_row_is_read_as_what_it_says_from_any_kind_of_file(tmp_path, made):
    row, question, gold = made
    contents = {
        ".jsonl": json.dumps(row).encode(),
        ".json": json.dumps([row], ensure_ascii=False).encode(),
        ".parquet": parquet_bytes([row]),
    }
    read = []
    for suffix, content in contents.items():
        (tmp_path / f"rows{suffix}").write_bytes(content)
        (e,) = refused_or_read(tmp_path / f"rows{suffix}")
        read.append(dataclasses.replace(e, id=""))
    assert read[0] == read[1] == read[2]
    e = read[0]
    assert e.messages[-1]["content"].startswith(question) and e.row == row
    assert e.reward in ("gsm8k", "number")
    for right, score in ((gold, 1.0), (gold + 1, 0.0)):
        assert rewards.score(None, e, f"I think it is \\boxed{{{right}}}.") == (score, None)
        assert rewards.score("math-verify", e, f"I think it is \\boxed{{{right}}}.") == (score, None)


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    ["prompt", "question", "answer", "reward_model", "reward_spec", "data_source", "a\nb", "\ud800"]
)


@given(st.lists(st.dictionaries(columns, cells, max_size=4) | cells, min_size=1, max_size=4))
@many(200)
def test_any_json_is_read_or_refused_in_one_line(tmp_path, rows):
    """Mixed schemas, wrong types, surrogates, NaN: a row at a time."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    examples = refused_or_read(path)
    if examples is not None:
        assert len(examples) == len(rows)
        assert all(rewards.score(None, e, "no answer")[0] in (0.0, 1.0) for e in examples)


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40), st.integers(0, 12))
@many(150)
def test_no_prompt_is_in_both_train_and_eval_and_none_is_lost(tmp_path, names, size):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{name}?", "answer": "1"}) + "\n" for name in names))
    examples, held_out = load_data(str(path), None, size)
    asked = [{data._key(e) for e in part} for part in (examples, held_out)]
    assert not asked[0] & asked[1] and len(held_out) <= size
    assert asked[0] | asked[1] == {f"user: {name}?" for name in names}


# ---- flags: what is written is what is read

TYPES = typing.get_type_hints(Args)
WORDS = st.text(alphabet="abcXYZ019-_./:~=, {}\"'é中", min_size=1, max_size=12).filter(
    lambda s: s not in ("None", "none")
)


def values(kind) -> st.SearchStrategy:
    """Values of a flag's type."""
    if kind is Thresholds:
        numbers = {float: st.floats(0, 1e6), int: st.integers(0, 10**6)}
        return st.builds(Thresholds, **{f.name: numbers[f.type] for f in dataclasses.fields(Thresholds)})
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    options = {int: st.integers(-(10**6), 10**12), float: st.floats(allow_nan=False), str: WORDS, bool: st.booleans()}
    parts = typing.get_args(kind) or (kind,)
    return st.one_of(
        [st.none() if part is type(None) else options[part] if part in options else values(part) for part in parts]
    )


any_args = st.builds(Args, **{name: values(kind) for name, kind in TYPES.items()})
RANGES = {  # of flags that work, whatever the others are
    "chat_template_kwargs": st.dictionaries(WORDS, st.none() | st.booleans() | WORDS, max_size=2).map(json.dumps),
    "top_p": st.just(1.0),
    "top_k": st.just(0),
    "tis_cap": st.just("auto"),  # numbers are for some corrections only
    "mask_low": st.none(),
    "mask_high": st.none(),
    "dual_clip": st.none() | st.floats(1.001, 100),
    "clip_high": st.floats(0, 10) | st.just(math.inf),
    "updates_per_batch": st.just(1),
    "lora_rank": st.just(0),  # not with the simulated formats
    "micro_batch_tokens": st.none(),
    "offload_optimizer": st.none() | st.just(False),
    "samples_per_prompt": st.none() | st.integers(2, 64),
    "overlong_buffer": st.integers(0, 8),
    "max_response_len": st.none() | st.integers(8, 10**6),
    "seed": st.integers(0, 2**32 - 1),
    "run_name": st.none() | WORDS.filter(lambda s: "/" not in s and s not in (".", "..")),
}


def working(name: str, kind) -> st.SearchStrategy:
    if name in RANGES:
        return RANGES[name]
    if (typing.get_args(kind) or (kind,))[0] in (int, float):
        number = st.integers(1, 1000) if int in (kind, *typing.get_args(kind)) else st.floats(0.01, 0.99)
        return number | st.none() if type(None) in typing.get_args(kind) else number
    return values(kind)


good_args = st.builds(Args, **{name: working(name, kind) for name, kind in TYPES.items()})


@given(any_args)
@many(80)
def test_flags_survive_the_command_line(args):
    flags = []
    for field in dataclasses.fields(Args):
        value, flag = getattr(args, field.name), config._flag(field.name)
        if field.name == "alarms":
            flags += [f"{flag}.{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(value).items()]
        elif TYPES[field.name] is bool:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag}={value}")
    assert tyro.cli(Args, args=flags) == args


@given(good_args)
@many(150)
def test_flags_that_work_survive_config_json(args):
    args = args.resolved()
    assert args.resolved() == args, "what was resolved once is what it is"
    text = json.dumps(train.config_of(args), allow_nan=False)
    read = config._of_json(json.loads(text))
    assert Args(**read) == args


@given(any_args)
@many(100)
def test_flags_that_do_not_work_are_refused_by_name(args):
    assume(not 0 < args.top_p < 2 or args.top_k)  # so that one of them at least is wrong
    with pytest.raises(ConfigError, match=r"--[a-z]") as error:
        args.resolved()
    assert len(str(error.value)) < ONE_LINE and len(str(error.value).splitlines()) == 1
