"""sample_log.py: which samples are logged, what a reader sees of their tokens, and numbers that JSON has."""

import runtime  # noqa: F401  (first: it sets what torch reads at import)

# isort: split
import json
import math
from pathlib import Path

import pytest

from config import TINY_MODEL
from data import Example, Prompt
from rollout import Group, Sample
from sample_log import TokenTexts, logged_samples, sample_record

needs_tiny_model = pytest.mark.skipif(
    not Path(TINY_MODEL, "model.safetensors").exists(), reason="assets/tiny-adder is not there"
)


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny model's: bytes are its smallest tokens, and no emoji is one token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


def make_group(samples: int) -> Group:
    example = Example("made:1", [{"role": "user", "content": "?"}], "1", "number", {})
    drawn = [Sample([i], [-0.5], "stop", str(i)) for i in range(samples)]
    return Group(Prompt(example, [1]), drawn, 7, [float(i % 2) for i in range(samples)])


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [1]), (3, [2, 1]), (4, [2, 2]), (99, [2, 2, 2])])
def test_at_most_so_many_samples_two_of_each_group(count, expected):
    groups = [make_group(4) for _ in range(3)]
    found = logged_samples(groups, count)
    assert [sum(g is group for g, _ in found) for group in groups if any(g is group for g, _ in found)] == expected
    assert all(i in (0, 1) for _, i in found)


@needs_tiny_model
@pytest.mark.parametrize(
    "text", ["12 + 30", "a 🦜!", "中文 and é", "👩‍👩‍👧", "\n\n  x\t", "<|im_end|>", "\u2028\x00", ""], ids=ascii
)
def test_texts_of_tokens_make_the_text_and_no_half_characters(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = TokenTexts(tokenizer)(ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert not any("\ufffd" in t for t in texts)


@needs_tiny_model
def test_of_a_character_in_parts_the_last_token_has_it(tokenizer):
    ids = tokenizer.encode("a🦜b", add_special_tokens=False)
    assert TokenTexts(tokenizer)(ids) == ["a", "", "", "", "🦜", "b"]
    assert TokenTexts(tokenizer)(ids[:3]) == ["a", "", "\ufffd"], "cut in the middle"
    assert "".join(TokenTexts(tokenizer)(ids[1:2] * 9 + ids[:1])).endswith("a"), "bytes that are no character"


def test_a_space_that_sentencepiece_drops_is_there():
    class Pieces:
        def decode(self, ids, **options):
            return "".join(self.convert_ids_to_tokens(i) for i in ids).replace("\u2581", " ").removeprefix(" ")

        def convert_ids_to_tokens(self, i):
            return ["\u2581two", "\u2581words", "!"][i]

    assert TokenTexts(Pieces())([0, 1, 2]) == [" two", " words", "!"]


def test_a_record_is_strict_json_with_rounded_numbers():
    group = make_group(2)
    group.samples[1] = Sample([5, 6, 7], [-0.123456, math.nan, -math.inf], "length", "t", [-0.00001, -2.0, -1 / 3])
    record = sample_record(3, group, 1, lambda ids: [f"<{i}>" for i in ids])
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "step": 3,
        "version": 7,
        "id": "made:1",
        "prompt": [{"role": "user", "content": "?"}],
        "answer": "1",
        "text": "t",
        "reward": 1.0,
        "tokens": 3,
        "finish_reason": "length",
        "token_texts": ["<5>", "<6>", "<7>"],
        "rollout_logprobs": [-0.1235, None, None],
        "logprobs": [0.0, -2.0, -0.3333],
    }
    assert sample_record(3, make_group(2), 0, lambda ids: ["x"])["logprobs"] == []
