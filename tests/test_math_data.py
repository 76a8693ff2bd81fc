"""data.py on DAPO-Math and AIME: copies, contradictions, the marker; from parquet files in the schema of the Hub's."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import rewards
from data import DataError, load_data

INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def rows(start, stop, copies, **extra):
    """Rows of the schema, the copies one file after the other; problem i asks for i + i."""
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": INSTRUCTION.format(f"What is ${i} + {i}$?"), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{i}"},
            **extra,
        }
        for _ in range(copies)
        for i in range(start, stop)
    ]


def with_answer(row, answer):
    return row | {"reward_model": row["reward_model"] | {"ground_truth": answer}}


def parquet(path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, rows): load_dataset(name) reads a parquet file of them through the real package, as its train split."""
    load, files = datasets.load_dataset, {}

    def load_dataset(name, config=None):
        return load("parquet", data_files={"train": files[name]}, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def store(name, rows):
        files[name] = parquet(tmp_path / f"{len(files)}.parquet", rows)

    return store


def test_dapo_math_is_read_once_a_prompt(hub, capsys):
    hub("BytedTsinghua-SIA/DAPO-Math-17k", rows(0, 1700, copies=3))
    train, evaluation = load_data("dapo-math", None, 0)
    assert (len(train), evaluation) == (1700, [])
    assert "dapo-math (train split): 5100 rows are copies of 1700 prompts\n" in capsys.readouterr().out
    first = train[0]
    assert (first.id, first.answer, first.reward, first.marker) == (
        "dapo-math/train:1",
        "0",
        "math-verify",
        "answer-line",
    )
    assert (first.messages, first.row) == (rows(0, 1, 1)[0]["prompt"], rows(0, 1, 1)[0])
    assert [e.answer for e in train] == [str(2 * i) for i in range(1700)]
    assert rewards.score(None, train[7], "It is 7 + 7.\n\nAnswer: $14$") == (1.0, None)
    assert rewards.score(None, train[7], r"It is \boxed{14}") == (0.0, None)


def test_a_prompt_whose_copies_contradict_each_other_is_left_out(hub, capsys):
    stored = rows(0, 20, copies=2)
    stored[3] = with_answer(stored[3], "7")
    stored[-1] = with_answer(stored[-1], "-1")
    hub("BytedTsinghua-SIA/DAPO-Math-17k", stored)
    train, _ = load_data("dapo-math", None, 0)
    assert [e.answer for e in train] == [str(2 * i) for i in range(19) if i != 3]
    said = "40 rows are copies of 20 prompts; 2 are left out, since their copies have different answers"
    assert said in capsys.readouterr().out


def test_aime_is_the_held_out_data(hub, capsys):
    hub("BytedTsinghua-SIA/DAPO-Math-17k", rows(0, 100, copies=2))
    hub(
        "BytedTsinghua-SIA/AIME-2024",
        rows(90, 120, copies=32, extra_info={"index": 0, "raw_problem": "?", "split": None}),
    )
    train, evaluation = load_data("dapo-math", "aime-2024", 512)
    assert (len(train), len(evaluation)) == (90, 30)
    assert {e.marker for e in train + evaluation} == {"answer-line"}
    out = capsys.readouterr().out
    assert "aime-2024 (train split): 960 rows are copies of 30 prompts" in out
    assert "dropped 10 of 100 training rows: prompt is in eval" in out


def test_without_aime_a_part_is_held_out(hub):
    hub("BytedTsinghua-SIA/DAPO-Math-17k", rows(0, 100, copies=2))
    train, evaluation = load_data("dapo-math", None, 512)
    assert (len(train), len(evaluation)) == (90, 10)


@pytest.mark.parametrize("name", ["dapo-math-17k.parquet", "dapo-math-17k-cleaned.parquet"])
def test_a_local_copy_of_the_file_is_the_same(tmp_path, name, capsys):
    path = parquet(tmp_path / name, rows(0, 50, copies=1 if "cleaned" in name else 100))
    train, _ = load_data(path, None, 0)
    assert [(e.answer, e.marker, e.reward) for e in train] == [
        (str(2 * i), "answer-line", "math-verify") for i in range(50)
    ]
    assert ("5000 rows are copies of 50 prompts" in capsys.readouterr().out) == ("cleaned" not in name)


def test_copies_in_other_data_are_the_users(tmp_path, capsys):
    path = parquet(tmp_path / "rows.parquet", rows(0, 5, copies=4, data_source="mine"))
    train, _ = load_data(path, None, 0)
    assert (len(train), {e.marker for e in train}, {e.reward for e in train}) == (20, {"box"}, {"number"})
    assert "are copies" not in capsys.readouterr().out


def test_rows_of_another_source_would_all_be_scored_0_and_are_refused(hub):
    hub("BytedTsinghua-SIA/AIME-2024", rows(0, 30, copies=32, data_source="aime"))
    with pytest.raises(DataError, match=r"aime-2024: BytedTsinghua-SIA/AIME-2024 has rows .* 'math_dapo'"):
        load_data("arithmetic:add1", "aime-2024", 30)


def test_a_row_without_an_answer_is_named(hub):
    stored = rows(0, 9, copies=2)
    stored[12] = with_answer(stored[12], None)
    hub("BytedTsinghua-SIA/DAPO-Math-17k", stored)
    with pytest.raises(DataError, match=r"row 13: column 'reward_model\.ground_truth' is null"):
        load_data("dapo-math", None, 0)


def test_answers_keep_what_gsm8k_would_cut(tmp_path):
    path = parquet(tmp_path / "rows.parquet", [with_answer(row, " #### $x^2$ ") for row in rows(0, 1, copies=1)])
    assert load_data(path, None, 0)[0][0].answer == "#### $x^2$"
