"""Prompts and their rewards: generated arithmetic, GSM8K, DAPO-Math and AIME, Hub datasets, local jsonl and parquet.

A row becomes an `Example`: a chat prompt, its ground truth, and the name of the reward that compares the two.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from answers import parse_number

GSM8K_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LAYOUTS = (
    "prompt + reward_model.ground_truth (verl), prompt + reward_spec.ground_truth (SkyRL), question|prompt + answer"
)
HUB_NAMES = {
    "gsm8k": "openai/gsm8k:main",
    "dapo-math": "BytedTsinghua-SIA/DAPO-Math-17k",
    "aime-2024": "BytedTsinghua-SIA/AIME-2024",
}
MATH_DAPO = "math_dapo"  # the data_source of the rows of both, whose prompts ask for a last line "Answer: ..."
ARITHMETIC_LEVELS = ("add1", "add2", "add3", "sub2", "mul", "chain")
ARITHMETIC_SAMPLE = 20_000  # problems drawn where the space is too large to list (add3, chain)


class DataError(ValueError):
    """A data source that cannot be used. The message names the file, row and column, or the flag, and
    the fix."""


@dataclass(frozen=True)
class Example:
    """One prompt and what its reward needs."""

    id: str
    """Stable, and unique inside one source."""
    messages: list[dict]
    """The chat prompt: [{"role": ..., "content": ...}, ...]."""
    answer: str
    """The ground truth that the reward compares with."""
    reward: str
    """Name of this row's default reward, a key of `rewards.REWARDS`."""
    row: dict
    """The source row as read, for user reward functions."""
    marker: str = "box"
    """Where a completion says its answer, a key of `answers.MARKERS`."""


@dataclass(frozen=True)
class Prompt:
    """An example with the tokens of its chat prompt, up to where the model's turn begins."""

    example: Example
    token_ids: list[int]


def _digest(text: str) -> int:
    """A 64-bit hash of `text` that is the same in every process and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---- generated arithmetic ----


def _problems(level: str) -> Iterator[tuple[int, ...]]:
    """Signed terms of every problem of a level: (23, 45) is 23 + 45, (17, 4, -9) is 17 + 4 - 9, factors for `mul`."""
    two_digit = range(10, 100)
    if level == "add1":
        yield from itertools.product(range(10), repeat=2)
    elif level == "add2":
        yield from itertools.product(two_digit, repeat=2)
    elif level == "sub2":  # no negative results
        yield from ((a, -b) for a, b in itertools.product(two_digit, repeat=2) if a >= b)
    elif level == "mul":
        yield from itertools.product(range(2, 13), repeat=2)
    else:
        rng = random.Random(f"arithmetic/{level}")

        def draw(low: int, high: int) -> int:  # by random(), whose sequence Python keeps the same across versions
            return low + int(rng.random() * (high - low + 1))

        drawn: dict[tuple[int, ...], None] = {}  # an ordered set
        while len(drawn) < ARITHMETIC_SAMPLE:
            if level == "add3":
                terms = (draw(100, 999), draw(100, 999))
            else:
                signed = [draw(1, 99) * (draw(0, 1) * 2 - 1) for _ in range(draw(1, 3))]
                terms = (draw(1, 99), *signed)
            drawn[terms] = None
        yield from drawn


def arithmetic_examples(level: str, split: Literal["train", "eval"]) -> list[Example]:
    """Every problem of one split of a level; always the same list, whatever the run's seed.

    About 10 % of the problems are "eval", by a hash of the sorted terms: 23 + 45 and 45 + 23 share a split.
    Levels: add1 (0..9), add2 (10..99), add3 (100..999, a sample), sub2 (10..99, never negative), mul (2..12),
    chain (2 to 4 terms of 1..99, a sample). Raises DataError for any other level.
    """
    if level not in ARITHMETIC_LEVELS:
        raise DataError(f"--data arithmetic:{level}: no such level; choose one of {', '.join(ARITHMETIC_LEVELS)}")
    examples = []
    for terms in _problems(level):
        in_eval = _digest(f"{level}/{sorted(terms)}") % 10 == 0
        if in_eval != (split == "eval"):
            continue
        if level == "mul":
            problem, answer = f"{terms[0]} * {terms[1]}", terms[0] * terms[1]
        else:
            problem = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
            answer = sum(terms)
        how = "Think step by step and give the answer in \\boxed{}." if level == "chain" else "Answer with a number."
        examples.append(
            Example(
                id=f"arithmetic:{level}/{split}/{problem}",
                messages=[{"role": "user", "content": f"What is {problem}? {how}"}],
                answer=str(answer),
                reward="number",
                row={"problem": problem, "answer": str(answer), "level": level},
            )
        )
    return examples


# ---- rows of a file or a Hub dataset ----


def _text(value: object, where: str) -> str:
    """`value` if it is a string with something in it, else a DataError that starts with `where`."""
    if isinstance(value, str) and value.strip():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} holds an unpaired surrogate, which no tokenizer takes; re-encode it") from None
        return value
    what = "null" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
    raise DataError(f"{where} is {what}; it must be a string that is not empty (write numbers in quotes)")


def _messages(value: object, where: str) -> list[dict]:
    if not isinstance(value, list):
        return [{"role": "user", "content": _text(value, where)}]
    if not value:
        raise DataError(f"{where} is an empty list; give at least one message")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}[{i}] is not a message; give {{'role': ..., 'content': ...}}")
        messages.append({key: _text(message.get(key), f"{where}[{i}].{key}") for key in ("role", "content")})
    return messages


def _columns(row: dict, where: str) -> tuple[str, str]:
    """(prompt column, answer column) of a file, detected from its first row."""
    prompt = next((name for name in ("prompt", "question") if name in row), None)
    answer = next((name for name in ("reward_model", "reward_spec", "answer") if name in row), None)
    if prompt is None or answer is None:
        missing = "'prompt' or 'question'" if prompt is None else "'answer', 'reward_model' or 'reward_spec'"
        found = " ".join(", ".join(map(str, row)).split()) or "none"
        found = found if len(found) <= 300 else found[:300] + ", ..."
        raise DataError(f"{where}: no column {missing} (found: {found}); the layouts read are: {LAYOUTS}")
    return prompt, answer


def _example(row: dict, columns: tuple[str, str], where: str, id: str) -> Example:
    for column in columns:
        if column not in row:
            raise DataError(
                f"{where}: column '{column}' is missing, though the first row has it; add it or drop the row"
            )
    prompt, column = (row[name] for name in columns)
    messages = _messages(prompt, f"{where}: column '{columns[0]}'")
    if columns[1] == "answer":
        answer = _text(column, f"{where}: column 'answer'")
    else:
        if not isinstance(column, dict):
            raise DataError(f"{where}: column '{columns[1]}' is not a struct; give {{'ground_truth': '...'}}")
        answer = _text(column.get("ground_truth"), f"{where}: column '{columns[1]}.ground_truth'")
    if _is_math_dapo(row):
        return Example(id, messages, answer.strip(), "math-verify", row, marker="answer-line")
    gsm8k = "####" in answer or "gsm8k" in str(row.get("data_source")).lower()
    answer = _text(answer.rpartition("####")[2], f"{where}: column '{columns[1]}' after '####'").strip()
    if gsm8k and not isinstance(prompt, list) and "\\boxed" not in prompt and "####" not in prompt:
        messages = [{"role": "user", "content": prompt + GSM8K_INSTRUCTION}]
    is_number = parse_number(answer, unit=gsm8k) is not None  # '7 Up' is no number
    return Example(id, messages, answer, ("gsm8k" if gsm8k else "number") if is_number else "exact", row)


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(1-based row, value): lines of jsonl (blank ones are skipped but numbered), or the items of one JSON list."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    whole = path.suffix.lower() == ".json" and content.lstrip().startswith(b"[")
    for number, line in enumerate([content] if whole else content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an integer without end
            where = f"{path}: row {number}" if not whole else str(path)
            raise DataError(f"{where} is not JSON in UTF-8 ({error}); give one object a line") from None
        yield from enumerate(value, 1) if whole else [(number, value)]


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), 1)
    except (pyarrow.lib.ArrowException, OSError, ValueError, OverflowError) as error:  # OverflowError: the year 10000
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: not a readable parquet file ({reason})") from None


def _is_math_dapo(row: object) -> bool:
    """Whether it is a row of DAPO-Math or AIME that has an answer."""
    if not isinstance(row, dict) or row.get("data_source") != MATH_DAPO:
        return False
    reward_model = row.get("reward_model")
    return isinstance(reward_model, dict) and isinstance(reward_model.get("ground_truth"), str)


def _without_copies(rows: Iterable[tuple[int, object]], source: str) -> Iterator[tuple[int, object]]:
    """The rows, but those of DAPO-Math and AIME once a prompt: their files hold each 100 and 32 times. A prompt whose
    copies have different answers is left out."""
    first: dict[str, tuple[int, dict]] = {}  # by prompt
    read, ambiguous = 0, set()
    for number, row in rows:
        if not _is_math_dapo(row):
            yield number, row
            continue
        read += 1
        prompt = str(row.get("prompt"))
        copy = first.setdefault(prompt, (number, row))[1]
        if copy["reward_model"]["ground_truth"] != row["reward_model"]["ground_truth"]:
            ambiguous.add(prompt)
    if read > len(first) - len(ambiguous):
        why = f"; {len(ambiguous)} are left out, since their copies have different answers" if ambiguous else ""
        print(f"[data] {source}: {read} rows are copies of {len(first)} prompts{why}", flush=True)
    yield from (numbered for prompt, numbered in first.items() if prompt not in ambiguous)


def _examples(rows: Iterable[tuple[int, object]], source: str, name: str) -> list[Example]:
    """Rows to examples. `source` is for messages (a path), `name` for ids."""
    examples, columns = [], None
    first: dict[int, str] = {}  # the answer of a prompt's first row
    contradicting = 0
    for number, row in _without_copies(rows, source):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is a {type(row).__name__}; give an object with columns: {LAYOUTS}")
        columns = columns or _columns(row, where)
        examples.append(_example(row, columns, where, f"{name}:{number}"))
        contradicting += first.setdefault(_digest(_key(examples[-1])), examples[-1].answer) != examples[-1].answer
    if not examples:
        raise DataError(f"{source}: the file is empty; give at least one row ({LAYOUTS})")
    if repeated := len(examples) - len(first):
        also = f", {contradicting} of them with another answer" if contradicting else ""
        print(f"[data] {source}: {repeated} of {len(examples)} rows repeat an earlier row's prompt{also}", flush=True)
    return examples


def _hub_examples(spec: str, split: Literal["train", "eval"]) -> list[Example] | None:
    """A split of the Hub dataset NAME or NAME:CONFIG; None if it has no such split."""
    name, _, config = HUB_NAMES.get(spec, spec).partition(":")
    local = "give a local .jsonl or .parquet file instead"
    try:
        import datasets
    except ImportError:
        raise DataError(f"'{spec}' is no local file, and the Hub needs: pip install datasets; or {local}") from None
    try:
        loaded = datasets.load_dataset(name, config or None)
    except ConnectionError as error:
        raise DataError(f"'{spec}' is no local file, and the Hub could not be reached ({error}); {local}") from None
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(
            f"'{spec}' is no local file, and the Hub dataset could not be loaded ({why}); "
            f"check the name (NAME or NAME:CONFIG; generated: arithmetic:LEVEL), or {local}"
        ) from None
    hub_split = "train" if split == "train" else "test"
    if hub_split in loaded:
        batches = loaded[hub_split].iter(1_000)  # ten times as fast as row by row
        rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        examples = _examples(enumerate(rows, 1), f"{spec} ({hub_split} split)", f"{spec}/{hub_split}")
        if spec in ("dapo-math", "aime-2024") and any(e.marker != "answer-line" for e in examples):
            raise DataError(f"{spec}: {name} has rows that are not of data_source '{MATH_DAPO}'; {local}")
        return examples
    if split == "train":
        raise DataError(f"'{spec}' has no train split (found: {', '.join(loaded)}); {local}")
    return None


def _read(spec: str, split: Literal["train", "eval"]) -> list[Example] | None:
    """One split of a source; None for the eval split of a source that has only one."""
    name, _, level = spec.partition(":")
    if name == "arithmetic":
        return arithmetic_examples(level or "add2", split)
    try:
        path = Path(spec).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user that there is not
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"'{spec[:200]}' is no path ({reason}); check --data and --eval-data") from None
    suffix = path.suffix.lower()
    reader = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows}.get(suffix)
    if spec not in ("", *HUB_NAMES) and exists:
        if reader is None or not path.is_file():
            raise DataError(f"{path}: cannot be read as data; give a .jsonl, .json or .parquet file")
        if split == "eval":
            return None
        try:
            return _examples(reader(path), str(path), path.name)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if reader is not None or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", spec):
        raise DataError(f"'{spec}': no such file; check the path given to --data or --eval-data")
    return _hub_examples(spec, split)


# ---- train and eval ----


def _key(example: Example) -> str:
    """The prompt with its whitespace normalised: what must not be in both train and eval."""
    return "\n".join(f"{m['role']}: {' '.join(m['content'].split())}" for m in example.messages)


def _cut(examples: list[Example], size: int) -> list[int]:
    """Indices of `size` examples in the order of their prompt's hash; further copies of a prompt come last."""
    copies: Counter[str] = Counter()
    order = []
    for i, example in enumerate(examples):
        key = _key(example)
        order.append((copies[key], _digest(key), i))
        copies[key] += 1
    return [i for *_, i in sorted(order)[:size]]


def load_data(data: str, eval_data: str | None, eval_size: int) -> tuple[list[Example], list[Example]]:
    """(train, eval) examples; no prompt is in both, and the choice depends on nothing but the arguments.

    `data`: arithmetic[:LEVEL], a key of HUB_NAMES, a .jsonl/.json/.parquet path, or a Hub dataset NAME[:CONFIG].
    `eval_data`: the same; None takes the eval split of `data`, or holds out min(eval_size, 10 %) of its prompts.
    `eval_size`: examples to keep for evaluation, 0 for none. Raises DataError.
    """
    if eval_size < 0:
        raise DataError(f"--eval-size {eval_size} is negative; give 0 for no evaluation")
    train = _read(data, "train")
    if eval_size == 0:
        if eval_data:
            print(f"[data] --eval-data {eval_data} has no effect: --eval-size is 0", flush=True)
        return train, []
    pool = _read(eval_data or data, "eval")
    if pool is None and eval_data:
        pool = _read(eval_data, "train")
    if pool is None:  # hold out a part of the file
        prompts = len({_key(example) for example in train})
        chosen = set(_cut(train, min(eval_size, max(1, prompts // 10)) if prompts > 1 else 0))
        pool = [example for i, example in enumerate(train) if i in chosen]
        train = [example for i, example in enumerate(train) if i not in chosen]
        print(f"[data] {data} has no eval split: {len(pool)} of its {prompts} prompts are held out", flush=True)
    evaluation = [pool[i] for i in _cut(pool, eval_size)]
    eval_keys = {_key(example) for example in pool}
    kept = [example for example in train if _key(example) not in eval_keys]
    if len(kept) < len(train):
        print(f"[data] dropped {len(train) - len(kept)} of {len(train)} training rows: prompt is in eval", flush=True)
    if not kept:
        raise DataError(f"--data {data}: every training prompt is also in eval; give another --eval-data")
    return kept, evaluation


def encode_prompts(
    examples: Sequence[Example],
    tokenizer,
    max_prompt_len: int,
    template_kwargs: dict | None = None,
    vocab_size: int | None = None,
) -> tuple[list[Prompt], int]:
    """Tokenize chat prompts (generation prompt added); returns the prompts and how many were too long and dropped.

    `max_prompt_len` is in tokens; `template_kwargs` go to the chat template; `vocab_size` is the model's. Raises
    DataError if the tokenizer has no chat template, if the template refuses a prompt, leaves the messages out or makes
    nothing of them, if a token is beyond the model's vocabulary, or if nothing is left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "--model: its tokenizer has no chat_template; take an instruct model, or save a template with the tokenizer"
        )
    options = {**(template_kwargs or {}), "tokenize": False, "add_generation_prompt": True}
    texts = []
    for example in examples:
        try:
            texts.append(tokenizer.apply_chat_template(example.messages, **options))
        except Exception as error:
            given = f" with --chat-template-kwargs {json.dumps(template_kwargs)}" if template_kwargs else ""
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{example.id}: the chat template of --model refuses this prompt{given} ({reason})"
            ) from error
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    _check_tokens(examples, ids, vocab_size)
    pairs = zip(examples, ids, strict=True)
    prompts = [Prompt(example, list(tokens)) for example, tokens in pairs if len(tokens) <= max_prompt_len]
    dropped = len(texts) - len(prompts)
    if dropped and not prompts:
        shortest = min(map(len, ids))
        raise DataError(
            f"--max-prompt-len {max_prompt_len}: all {dropped} prompts are longer; the shortest has {shortest} tokens"
        )
    if dropped:
        print(
            f"[data] dropped {dropped} of {len(texts)} prompts longer than --max-prompt-len {max_prompt_len}",
            flush=True,
        )
    return prompts, dropped


def _check_tokens(examples: Sequence[Example], ids: Sequence[Sequence[int]], vocab_size: int | None) -> None:
    """DataError where a template or tokenizer that does not fit would be seen much later, or never."""
    for example, tokens in zip(examples, ids, strict=True):
        if not tokens:
            raise DataError(
                f"{example.id}: this prompt has no tokens: the chat template of --model makes nothing of it, or the "
                "tokenizer's own file (tokenizer.json) is missing there"
            )
        if vocab_size is not None and max(tokens) >= vocab_size:
            raise DataError(
                f"{example.id}: token {max(tokens)} of this prompt is beyond the model's {vocab_size}: the tokenizer "
                "of --model is another's, or has tokens that the embedding was not resized for"
            )
    if len(set(map(tuple, ids))) == 1 and len({_key(example) for example in examples}) > 1:
        raise DataError(
            f"all {len(ids)} prompts have the same tokens, though they ask different things: the chat template of "
            "--model leaves the messages out, or the tokenizer's own file (tokenizer.json) is missing there"
        )


class PromptStream:
    """Prompts without end, in an order that (seed, epoch) decides; each comes once an epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise DataError("no prompts to draw from; check --data and --max-prompt-len")
        self.prompts, self.seed = list(prompts), seed
        self.epoch = 0
        """Whole passes finished."""
        self._drawn = 0  # in this epoch
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        return sorted(range(len(self.prompts)), key=lambda _: rng.random())

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; goes on into the next epoch where this one ends."""
        taken: list[Prompt] = []
        while len(taken) < n:
            indices = self._order[self._drawn : self._drawn + n - len(taken)]
            taken += [self.prompts[i] for i in indices]
            self._drawn += len(indices)
            if self._drawn == len(self.prompts):
                self.epoch, self._drawn = self.epoch + 1, 0
                self._order = self._shuffle()
        return taken

    @cached_property
    def _fingerprint(self) -> int:
        return _digest(json.dumps([(p.example.id, p.token_ids) for p in self.prompts]))

    def state_dict(self) -> dict:
        """Plain numbers, fit for JSON."""
        return {"seed": self.seed, "epoch": self.epoch, "drawn": self._drawn, "prompts": self._fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken. Raises DataError if it belongs to other prompts or another seed."""
        if state["seed"] != self.seed:
            raise DataError(f"--seed {self.seed}: the saved prompt stream has seed {state['seed']}; resume with that")
        if state["prompts"] != self._fingerprint:
            raise DataError("--data: the saved prompt stream was drawn from other prompts; resume with the same data")
        self.epoch, self._drawn = state["epoch"], state["drawn"]
        self._order = self._shuffle()
