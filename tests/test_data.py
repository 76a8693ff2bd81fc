"""data.py: what a bad file must say, and what must never be in both train and eval."""

import json
import subprocess
import sys

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import data
import rewards
from data import (
    ARITHMETIC_LEVELS,
    DataError,
    Example,
    Prompt,
    PromptStream,
    arithmetic_examples,
    encode_prompts,
    load_data,
)
from rewards import number_reward

HUGE = 10_000_000  # characters


def example(i: int = 0, text: str = "2 + 2?", reward: str = "number") -> Example:
    return Example(f"made:{i}", [{"role": "user", "content": text}], "4", reward, {"n": i})


def jsonl(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def text_of(examples) -> list[str]:
    return [e.messages[-1]["content"] for e in examples]


def test_import_is_light():
    heavy = "{'datasets', 'pyarrow', 'torch', 'transformers'}"
    code = f"import sys, data; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=data.__file__.rpartition("/")[0] or ".")


# ---- arithmetic ----


@pytest.mark.parametrize("level", ARITHMETIC_LEVELS)
def test_arithmetic_splits(level):
    train, evaluation = (arithmetic_examples(level, split) for split in ("train", "eval"))
    total = len(train) + len(evaluation)
    assert total <= data.ARITHMETIC_SAMPLE and 0.05 < len(evaluation) / total < 0.2
    assert len({e.id for e in train + evaluation}) == len(set(text_of(train + evaluation))) == total

    def canonical(e):  # signed terms, in any order
        problem = e.row["problem"].replace("- ", "-").replace("+ ", "").replace("* ", "")
        return tuple(sorted(problem.split()))

    assert not {canonical(e) for e in train} & {canonical(e) for e in evaluation}
    for e in train[::37] + evaluation[::37]:
        assert e.reward == "number" and e.answer == str(eval(e.row["problem"]))
        assert e.messages[0]["content"].startswith(f"What is {e.row['problem']}? ")
        assert number_reward(e.answer, e.answer) == 1.0


def test_arithmetic_is_pinned():
    """A model trained on the train split in the past must not meet it as eval: these values may never change."""
    assert load_data("arithmetic", None, 3) == load_data("arithmetic:add2", None, 3)
    evaluation = arithmetic_examples("add2", "eval")
    assert (len(evaluation), text_of(evaluation)[0]) == (757, "What is 10 + 11? Answer with a number.")
    chain = arithmetic_examples("chain", "train")[0].messages[0]["content"]
    assert chain.endswith("? Think step by step and give the answer in \\boxed{}.")
    sizes = {level: len(arithmetic_examples(level, "eval")) for level in ARITHMETIC_LEVELS}
    assert sizes == SIZES


SIZES = {"add1": 13, "add2": 757, "add3": 1990, "sub2": 385, "mul": 16, "chain": 2042}


@pytest.mark.parametrize("level, terms", [("add1", "0 1 8 9"), ("mul", "2 3 11 12")])
def test_arithmetic_covers_its_operands(level, terms):
    operands = {
        t for split in ("train", "eval") for e in arithmetic_examples(level, split) for t in e.row["problem"].split()
    }
    assert set(terms.split()) <= operands


# ---- reading ----

VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7},
}


@pytest.mark.parametrize(
    "row, content, answer, reward",
    [
        ({"question": "Q?", "answer": "so 1 + 1 = 2\n#### 1,002"}, "Q?" + data.GSM8K_INSTRUCTION, "1,002", "gsm8k"),
        ({"question": "Q?", "answer": "no number\n#### blue"}, "Q?" + data.GSM8K_INSTRUCTION, "blue", "exact"),
        ({"question": "Q? Use \\boxed{}.", "answer": "#### 2"}, "Q? Use \\boxed{}.", "2", "gsm8k"),
        ({"question": "Q?", "answer": " -2.5 "}, "Q?", "-2.5", "number"),
        ({"question": "Q?", "answer": "7 Up"}, "Q?", "7 Up", "exact"),
        ({"question": "Q?", "answer": "1/2"}, "Q?", "1/2", "exact"),
        ({"prompt": "Q?", "answer": "Paris"}, "Q?", "Paris", "exact"),
        ({"prompt": [{"role": "user", "content": "Q?"}], "answer": "#### 2"}, "Q?", "2", "gsm8k"),
        ({"prompt": "P?", "question": "Q?", "answer": "2"}, "P?", "2", "number"),
        (VERL, "1 + 1?", "2", "math-verify"),
        (VERL | {"data_source": "openai/gsm8k"}, "1 + 1?", "2", "gsm8k"),
        (VERL | {"data_source": None, "answer": "3"}, "1 + 1?", "2", "number"),
        ({"prompt": VERL["prompt"], "reward_spec": {"ground_truth": "2"}}, "1 + 1?", "2", "number"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_layouts(tmp_path, row, content, answer, reward, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    train, evaluation = load_data(str(path), None, 0)
    assert (text_of(train), train[0].answer, train[0].reward, evaluation) == ([content], answer, reward, [])
    assert (train[0].row, train[0].id) == (row, f"rows{suffix}:1")
    if isinstance(row.get("prompt"), list):
        assert train[0].messages == row["prompt"]


GOOD = {"question": "Q?", "answer": "1"}
BAD_ROWS = [  # (rows, words of the message)
    (["{"], ["row 1", "JSON"]),
    ([GOOD, "", "nonsense"], ["row 3", "JSON"]),  # a blank line keeps its number
    (["[" * 100_000], ["row 1", "JSON"]),
    (['{"question": "Q?", "answer": ' + "1" * 5_000 + "}"], ["row 1", "JSON"]),
    (["[1, 2]"], ["row 1", "list"]),
    ([GOOD, "null"], ["row 2", "NoneType"]),
    ([], ["empty"]),
    (["", "  "], ["empty"]),
    ([{}], ["row 1", "'prompt' or 'question'", "found: none"]),
    ([{"question": "Q?", "gold": "1"}], ["row 1", "'answer'", "found: question, gold", "reward_model"]),
    (["", {"text": "Q?", "answer": "1"}], ["row 2", "'prompt' or 'question'"]),
    ([{"text": "Q?", "answer": "1"}], ["row 1", "'prompt' or 'question'", "found: text, answer"]),
    ([GOOD, {"question": "Q?"}], ["row 2", "'answer'", "missing"]),
    ([GOOD, {"answer": "1"}], ["row 2", "'question'", "missing"]),
    ([GOOD, {"question": None, "answer": "1"}], ["row 2", "'question'", "null"]),
    ([GOOD, {"question": "Q?", "answer": None}], ["row 2", "'answer'", "null"]),
    ([GOOD, {"question": "Q?", "answer": 1}], ["row 2", "'answer'", "int", "quotes"]),
    ([{"question": "Q?", "answer": " "}], ["row 1", "'answer'", "empty"]),
    ([{"question": "", "answer": "1"}], ["row 1", "'question'", "empty"]),
    ([{"question": "Q?", "answer": "so\n#### "}], ["row 1", "'answer'", "####", "empty"]),
    ([{"question": "Q \ud800", "answer": "1"}], ["row 1", "'question'", "surrogate"]),
    ([VERL | {"prompt": []}], ["row 1", "'prompt'", "empty list"]),
    ([VERL | {"prompt": ["hi"]}], ["row 1", "'prompt'[0]", "role"]),
    ([VERL | {"prompt": [{"role": "user"}]}], ["row 1", "'prompt'[0].content", "null"]),
    ([VERL | {"prompt": [{"content": "hi"}]}], ["row 1", "'prompt'[0].role", "null"]),
    ([VERL | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], ["'prompt'[0].content", "list"]),
    ([VERL | {"reward_model": None}], ["row 1", "'reward_model'", "ground_truth"]),
    ([VERL | {"reward_model": {"style": "rule"}}], ["row 1", "'reward_model.ground_truth'", "null"]),
    ([VERL | {"reward_model": {"ground_truth": 2}}], ["row 1", "'reward_model.ground_truth'", "int"]),
]


@pytest.mark.parametrize("rows, words", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, rows, words):
    path = jsonl(tmp_path / "bad.jsonl", rows)
    for arguments in ((path, None, 4), ("arithmetic:add1", path, 4)):
        with pytest.raises(DataError) as error:
            load_data(*arguments)
        for word in [path, *words]:
            assert word in str(error.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.jsonl", None, ["gone.jsonl", "no such file"]),
        ("gone.parquet", None, ["gone.parquet", "no such file"]),
        ("sub/dir/gone", None, ["no such file"]),
        ("rows.csv", b"a,b", ["rows.csv", ".jsonl"]),
        ("rows.parquet", b"not parquet", ["rows.parquet", "not a readable parquet"]),
        ("rows.parquet", b"", ["rows.parquet", "not a readable parquet"]),
        ("rows.json", b"[{]", ["rows.json", "JSON"]),
        ("rows.json", b"[]", ["rows.json", "empty"]),
        ("rows.jsonl", b"", ["rows.jsonl", "empty"]),
        ("rows.jsonl", b'{"question": "\xff", "answer": "1"}', ["row 1", "UTF-8"]),
        ("rows.jsonl", '{"question": "Q"}'.encode("utf-16"), ["row 1", "UTF-8"]),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_data(str(path), None, 4)
    for word in words:
        assert word in str(error.value)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read as data"):
        load_data(str(tmp_path), None, 4)


def test_bad_row_of_a_parquet_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [VERL, VERL, VERL | {"reward_model": {"style": "rule", "ground_truth": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"rows\.parquet: row 3: column 'reward_model\.ground_truth' is null"):
        load_data(str(path), None, 4)


def test_bom_crlf_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + (line + "\r\n" + line).encode())
    assert text_of(load_data(str(path), None, 0)[0]) == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    "spec, size, words",
    [
        ("arithmetic:add9", 4, ["add9", "add2", "chain"]),
        ("arithmetic", -1, ["--eval-size", "-1"]),
        ("", 4, ["no such file"]),
        ("no such name", 4, ["no such file"]),
    ],
)
def test_bad_flags(spec, size, words):
    with pytest.raises(DataError) as error:
        load_data(spec, None, size)
    for word in words:
        assert word in str(error.value)


values = st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.lists(st.text(max_size=4), max_size=2)
structs = st.fixed_dictionaries({}, optional={k: values for k in ("role", "content", "ground_truth")})
cells = values | structs | st.lists(structs, max_size=2)
names = ("prompt", "question", "answer", "reward_model", "reward_spec", "data_source")


@given(st.lists(st.fixed_dictionaries({}, optional={name: cells for name in names}) | values, max_size=3))
@settings(max_examples=300, deadline=None, database=None)
def test_fuzz_row_reader(rows):
    """Any row is either read into non-empty strings, or refused by a DataError that names the file."""
    try:
        examples = data._examples(enumerate(rows, 1), "FILE", "name")
    except DataError as error:
        assert str(error).startswith("FILE: ")
        return
    assert len(examples) == len(rows)
    for e in examples:
        assert e.answer.strip() == e.answer != "" and e.reward in rewards.REWARDS and e.marker in answers.MARKERS
        assert e.messages and all(m["role"].strip() and m["content"].strip() for m in e.messages)


# ---- the Hub ----


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: hub[name, config] is a dict of splits, each a list of rows, or what loading raises."""
    stored = {}

    def load_dataset(name, config=None):
        if isinstance(stored[name, config], Exception):
            raise stored[name, config]
        return {split: datasets.Dataset.from_list(rows) for split, rows in stored[name, config].items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def questions(start, stop):
    return [{"question": f"{i} plus 1?", "answer": f"#### {i + 1}"} for i in range(start, stop)]


def test_gsm8k_comes_from_the_hub(hub):
    hub["openai/gsm8k", "main"] = {"train": questions(0, 9), "test": questions(20, 29)}
    train, evaluation = load_data("gsm8k", None, 4)
    assert (len(train), len(evaluation), train[0].reward, train[0].id) == (9, 4, "gsm8k", "gsm8k/train:1")
    assert all(e.id.startswith("gsm8k/test:") for e in evaluation)


def test_hub_dataset_without_test_split_is_held_out(hub):
    hub["someone/maths", "en"] = {"train": questions(0, 50)}
    train, evaluation = load_data("someone/maths:en", None, 100)
    assert (len(train), len(evaluation)) == (45, 5)


@pytest.mark.parametrize(
    "stored, words",
    [
        (ConnectionError("no route"), ["could not be reached", "no route", ".jsonl", ".parquet"]),
        (ValueError("Config name is missing"), ["could not be loaded", "Config name is missing", "NAME:CONFIG"]),
        ({"validation": []}, ["no train split", "validation"]),
        ({"train": []}, ["train split", "empty"]),
        ({"train": [{"text": "a"}]}, ["train split", "row 1", "found: text"]),
    ],
)
def test_hub_failures(hub, stored, words):
    hub["someone/maths", None] = stored
    with pytest.raises(DataError) as error:
        load_data("someone/maths", None, 4)
    for word in ["someone/maths", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("package, spec", [("datasets", "gsm8k"), ("pyarrow", "rows.parquet")])
def test_missing_package_says_what_to_install(monkeypatch, tmp_path, package, spec):
    (tmp_path / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.lib", None)
    with pytest.raises(DataError, match=f"pip install {package}"):
        load_data(spec, None, 4)


# ---- train and eval ----


def keys(examples) -> set[str]:
    return {" ".join(text.split()) for text in text_of(examples)}


@pytest.mark.parametrize(
    "rows, size, held_out", [(100, 4, 4), (100, 50, 10), (5, 4, 1), (2, 4, 1), (1, 4, 0), (9, 0, 0)]
)
def test_held_out_part_of_a_file(tmp_path, capsys, rows, size, held_out):
    path = jsonl(tmp_path / "rows.jsonl", questions(0, rows))
    train, evaluation = load_data(path, None, size)
    assert (len(train), len(evaluation)) == (rows - held_out, held_out)
    assert not keys(train) & keys(evaluation)
    assert load_data(path, None, size) == (train, evaluation)
    assert (f"{held_out} of its {rows} prompts" in capsys.readouterr().out) == (size > 0)


def test_held_out_rows_do_not_depend_on_the_order_of_the_file(tmp_path):
    rows = questions(0, 60)
    one = load_data(jsonl(tmp_path / "a.jsonl", rows), None, 6)[1]
    other = load_data(jsonl(tmp_path / "b.jsonl", rows[::-1]), None, 6)[1]
    assert keys(one) == keys(other)


def test_duplicates_stay_on_one_side(tmp_path, capsys):
    rows = [
        {"question": f" {i}  plus 1?" if copy % 2 else f"{i} plus\n1?", "answer": "1"}
        for copy in range(5)
        for i in range(40)
    ]
    train, evaluation = load_data(jsonl(tmp_path / "rows.jsonl", rows), None, 50)
    assert not keys(train) & keys(evaluation)
    assert (len(train), len(evaluation)) == (36 * 5, 4)  # each prompt once in eval; its copies are in neither
    assert capsys.readouterr().out.count("dropped 16 of 196 training rows") == 1


def test_train_rows_in_eval_data_are_dropped_once_and_counted(tmp_path, capsys):
    train_file = jsonl(tmp_path / "train.jsonl", questions(0, 20))
    eval_rows = [{"question": f"{i}   plus 1? ", "answer": f"#### {i + 1}"} for i in range(15, 30)]
    train, evaluation = load_data(train_file, jsonl(tmp_path / "eval.jsonl", eval_rows), 3)
    assert (len(train), len(evaluation)) == (15, 3)  # what eval_size cuts away is still no training data
    assert capsys.readouterr().out.count("dropped 5 of 20 training rows") == 1


def test_eval_cut_takes_every_prompt_before_its_copies(tmp_path):
    eval_file = jsonl(tmp_path / "eval.jsonl", questions(0, 6) * 8)
    evaluation = load_data("arithmetic:add1", eval_file, 6)[1]
    assert len(evaluation) == len(keys(evaluation)) == 6
    more = load_data("arithmetic:add1", eval_file, 48)[1]
    assert len(more) == 48 and more[:6] == evaluation


def test_same_file_for_both_is_refused(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", questions(0, 5))
    with pytest.raises(DataError, match=r"rows\.jsonl: every training prompt is also in eval.*--eval-data"):
        load_data(path, path, 4)


def test_arithmetic_eval_size_and_eval_data():
    train, evaluation = load_data("arithmetic", None, 50)
    assert len(evaluation) == 50 and not keys(train) & keys(evaluation)
    assert load_data("arithmetic", None, 10)[1] == evaluation[:10]
    harder = load_data("arithmetic", "arithmetic:add3", 10)[1]
    assert keys(harder) <= keys(arithmetic_examples("add3", "eval"))


def test_eval_size_zero(capsys):
    assert load_data("arithmetic:add1", "gone.jsonl", 0) == (arithmetic_examples("add1", "train"), [])
    assert "--eval-data gone.jsonl has no effect" in capsys.readouterr().out


# ---- tokens ----


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<bos>", "<eos>", "<user>", "<model>", *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %} <user> {{ m.content }}{% endfor %}{% if add_generation_prompt %} <model>{% endif %}"
    )
    return made


def test_encode_prompts_is_the_chat_template(tokenizer, capsys):
    examples = [example(0, "a b"), example(1, "c")]
    prompts, dropped = encode_prompts(examples, tokenizer, 5)
    assert [p.token_ids for p in prompts] == [[1, 3, 5, 6, 4], [1, 3, 7, 4]]  # one <bos>, ends with <model>
    assert (dropped, [p.example for p in prompts], capsys.readouterr().out) == (0, examples, "")
    for p in prompts:
        want = tokenizer.apply_chat_template(p.example.messages, add_generation_prompt=True, return_dict=False)
        assert p.token_ids == want
    assert encode_prompts([], tokenizer, 5) == ([], 0)


def test_encode_prompts_drops_what_is_too_long_and_says_so(tokenizer, capsys):
    examples = [example(0, "a b"), example(1, "a b c d e"), example(2, "a"), example(3, "a " * 90)]
    prompts, dropped = encode_prompts(examples, tokenizer, 5)
    assert ([p.example.id for p in prompts], dropped) == (["made:0", "made:2"], 2)
    assert capsys.readouterr().out.count("dropped 2 of 4 prompts longer than --max-prompt-len 5") == 1
    with pytest.raises(DataError, match="--max-prompt-len 3: all 4 prompts are longer; the shortest has 4 tokens"):
        encode_prompts(examples, tokenizer, 3)


def test_encode_prompts_errors(tokenizer, monkeypatch):
    system = Example("file:9", [{"role": "system", "content": "a"}], "4", "number", {})
    with pytest.raises(DataError, match=r"file:9.*no system role"):
        encode_prompts([system], tokenizer, 9)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat_template; take an instruct model"):
        encode_prompts([example()], tokenizer, 9)


# ---- the stream ----


def numbered(n: int) -> list[Prompt]:
    return [Prompt(example(i), [i]) for i in range(n)]


def drawn(stream: PromptStream, *counts: int) -> list[int]:
    return [p.token_ids[0] for count in counts for p in stream.take(count)]


def test_stream_covers_every_epoch_once():
    stream = PromptStream(numbered(10), seed=0)
    order = drawn(stream, 3, 3, 3, 3, 3, 3, 12)  # crosses epochs inside a take
    epochs = [order[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # reshuffled
    assert (stream.epoch, drawn(stream, 0)) == (3, [])


def test_stream_depends_on_seed_alone():
    orders = [
        drawn(PromptStream(numbered(50), seed), *counts) for seed, *counts in ((1, 120), (1, 7, 63, 50), (2, 120))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_take_of_more_than_an_epoch():
    order = drawn(PromptStream(numbered(3), seed=0), 10)
    assert [sorted(order[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3 and len(order) == 10


@pytest.mark.parametrize("before", [0, 1, 9, 10, 11, 25])
def test_stream_state_survives_json(before):
    stream = PromptStream(numbered(10), seed=5)
    drawn(stream, before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(numbered(10), seed=5)
    drawn(resumed, 4)  # what it did before loading does not matter
    resumed.load_state_dict(state)
    assert resumed.epoch == stream.epoch == before // 10
    assert drawn(resumed, 33) == drawn(stream, 33)


def test_stream_refuses_another_runs_state():
    state = PromptStream(numbered(10), seed=5).state_dict()
    with pytest.raises(DataError, match=r"--seed 6.*seed 5"):
        PromptStream(numbered(10), seed=6).load_state_dict(state)
    with pytest.raises(DataError, match="--data"):
        PromptStream(numbered(11), seed=5).load_state_dict(state)
    with pytest.raises(DataError, match="--max-prompt-len"):
        PromptStream([], seed=5)
