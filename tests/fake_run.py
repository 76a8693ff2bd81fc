"""train.py's loop in this process, with an engine that writes down what is asked of it."""

import json
import sys
from pathlib import Path

import parts
import run_report
import train
from rollout import Sample


class FakeEngine:
    """Answers "1" or "2" by turns to everything; `events` is what was asked of it, in order."""

    events: list = []  # noqa: RUF012  (reset by install)
    seconds_loading = 0.0

    def __init__(self, model, *, tokenizer, **options):
        self.tokenizer, self.version, self.model, self.ranks = tokenizer, None, None, options["ranks"]
        self.turn = 0
        self.events.append("build")

    def wake(self, *tags):
        self.events.append(f"wake {' '.join(tags)}")

    def sleep(self):
        self.events.append("sleep")

    def weight_blocks(self):
        return []

    def load_by_vllm(self, weights):
        raise AssertionError("for the plan to call")

    def publish(self, version):
        self.events.append(f"publish {version}")
        self.version = version

    def generate(self, prompts, *, n, max_tokens, greedy=False, on_finished=lambda i, samples: None):
        self.events.append("greedy" if greedy else "sample")
        groups = [[self._sample() for _ in range(n)] for _ in prompts]
        for i, samples in enumerate(groups):
            on_finished(i, samples)
        return groups

    def _sample(self):
        self.turn += 1
        text = str(1 + self.turn % 2)
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]
        return Sample(ids, [-1.0] * len(ids), "stop", text)


class FakePlan:
    bytes_written = bytes_moved = 0

    @classmethod
    def build(cls, policy, engine_model, ranks=None):
        return cls()

    def formats(self):
        return {}

    def check_formats(self, quant, skip=()):
        FakeEngine.events.append(f"formats {quant}")

    def check_coverage(self, blocks):
        FakeEngine.events.append(f"coverage {blocks}")

    def prove(self, load):
        assert load.__name__ == "load_by_vllm"
        FakeEngine.events.append("prove")
        return 0

    def sync(self):
        FakeEngine.events.append("sync")

    def verify(self, turn=0, full=False):
        FakeEngine.events.append("verify full" if full else f"verify {turn}")


def install(monkeypatch) -> list:
    """Put them in the place of the real ones; what is asked of the engine, in order."""
    monkeypatch.setattr(parts, "Engine", FakeEngine)
    monkeypatch.setattr(parts, "SyncPlan", FakePlan)
    monkeypatch.setattr(FakeEngine, "events", [])
    monkeypatch.setattr(run_report, "draw", lambda runs, out: out.write_bytes(b"drawn"))  # a second for each run
    return FakeEngine.events


def one_or_two(tmp_path: Path, right: str = "1") -> list[str]:
    """Flags of a run whose every question has the answer `right`."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i}?", "answer": right} for i in range(12)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [f"--data={data}", f"--runs-dir={tmp_path / 'runs'}", "--prompts-per-step=2", "--samples-per-prompt=2"]


def run_main(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
