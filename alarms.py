"""Alarms: what a run says, or ends for, when a step's metrics show that something is wrong.

Every alarm is an event with its numbers in events.jsonl. Those that make a run worthless stop it, with a checkpoint;
the others are said once each time they begin.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WINDOW = 20  # steps of a running level
ENOUGH = 3  # steps before there is one


class AlarmError(RuntimeError):
    """A step that makes going on worthless; the message names the numbers and the flag of the threshold."""


@dataclass(frozen=True)
class Thresholds:
    """Flags `--alarms.NAME`; 0 turns an alarm off."""

    mismatch: float = 4.0
    """Stop where two steps in a row have a mean abs(log pi_old - log mu) of this many times its median over the last
    20: stale or corrupt weights in the engine. One such step is said: few tokens can make it by chance."""
    entropy: float = 0.1
    """Say so where the entropy falls below this share of its mean over the first 3 steps: the policy has collapsed."""
    equal_groups: int = 5
    """Stop after this many steps in a row without a group of mixed rewards: there is nothing to learn from."""
    length: float = 0.9
    """Say so where more than this share of the responses is cut at --max-response-len."""
    skipped_updates: int = 5
    """Stop after this many steps in a row in which a loss or gradient was not finite and no update was made."""
    reward_errors: float = 0.5
    """Stop where more than this share of a step's rewards failed: an exception, no number, too slow."""


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    step: int
    event: str
    message: str
    numbers: dict[str, float]
    stops: bool = False

    def line(self) -> dict[str, Any]:
        return {"step": self.step, "event": self.event, "message": self.message} | self.numbers


@dataclass
class Alarms:
    """Running statistics and what they say of a step; `state` is plain numbers, fit for JSON."""

    thresholds: Thresholds
    state: dict[str, Any] = field(
        default_factory=lambda: {
            "gaps": [], "high": 0, "entropies": [], "equal": 0, "skipped": 0, "skipped_total": 0, "errors": 0,
            "scored": 0, "active": [],
        }
    )  # fmt: skip

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        """The alarms that begin with this step, those that stop the run first."""
        found = [
            *self._mismatch(step, metrics), *self._equal_groups(step, metrics), *self._updates(step, metrics),
            *self._rewards(step, metrics), *self._entropy(step, metrics), *self._length(step, metrics),
        ]  # fmt: skip
        new = [e for e in found if e.stops or e.event not in self.state["active"]]
        self.state["active"] = [e.event for e in found]
        return sorted(new, key=lambda e: not e.stops)

    def _mismatch(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        gap, gaps = metrics.get("mismatch/abs_dlogp_mean"), self.state["gaps"]
        if gap is None:
            return []
        level = median(gaps) if len(gaps) >= ENOUGH else None
        limit = self.thresholds.mismatch
        high = bool(limit) and level is not None and not gap <= limit * level
        self.state["high"] = self.state["high"] + 1 if high else 0
        if high:
            numbers = {"abs_dlogp_mean": gap, "level": level, "threshold": limit, "steps": self.state["high"]}
            times = gap / level if level else math.inf
            message = (
                f"mean |log pi_old - log mu| is {gap:.4g}, {times:.1f} times its usual {level:.4g}: stale or "
                f"corrupt weights in the engine, if it stays so (--alarms.mismatch {limit:g})"
            )
            return [Event(step, "mismatch", message, numbers, stops=self.state["high"] >= 2)]
        if math.isfinite(gap):
            gaps.append(gap)
            del gaps[:-WINDOW]
        return []

    def _equal_groups(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        state, limit = self.state, self.thresholds.equal_groups
        state["equal"] = 0 if metrics["sampling/groups_mixed"] else state["equal"] + 1
        if not limit or state["equal"] < limit:
            return []
        solved, failed = metrics["reward/solved_share"], metrics["reward/failed_share"]
        message = (
            f"no group had mixed rewards for {state['equal']} steps; of the last prompts {solved:.0%} were always "
            f"solved, {failed:.0%} never: other --data or --reward, or --alarms.equal-groups 0"
        )
        numbers = {"steps": state["equal"], "solved_share": solved, "failed_share": failed}
        return [Event(step, "equal_groups", message, numbers, stops=True)]

    def _updates(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        state, limit = self.state, self.thresholds.skipped_updates
        skipped = metrics["train/skipped_total"] - state["skipped_total"]
        state["skipped_total"] = metrics["train/skipped_total"]
        applied = metrics["train/updates_applied"]
        state["skipped"] = state["skipped"] + 1 if skipped and not applied else 0
        nonfinite = metrics.get("train/tokens_nonfinite", 0)
        loss = metrics.get("train/loss", 0.0)
        if not skipped and not nonfinite and math.isfinite(loss):
            return []
        numbers = {"skipped": skipped, "applied": applied, "tokens_nonfinite": nonfinite, "steps": state["skipped"]}
        stops = bool(limit) and state["skipped"] >= limit
        message = (
            f"{skipped} updates skipped for a gradient that was not finite, {nonfinite} tokens with a log-prob of the "
            "sampler that was not"
        )
        if stops:
            message += f"; no update for {state['skipped']} steps (--alarms.skipped-updates {limit})"
        return [Event(step, "nonfinite", message, numbers, stops=stops)]

    def _rewards(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        state, limit = self.state, self.thresholds.reward_errors
        errors, scored = (metrics[f"reward/{name}"] - state[name] for name in ("errors", "scored"))
        state["errors"], state["scored"] = metrics["reward/errors"], metrics["reward/scored"]
        share = errors / max(1, scored)
        if not limit or share <= limit:
            return []
        message = (
            f"{errors} of {scored} rewards failed (see the first one's message above): mend --reward, or "
            f"--reward-time-limit, or --alarms.reward-errors {limit:g}"
        )
        numbers = {"errors": errors, "scored": scored, "threshold": limit}
        return [Event(step, "reward_errors", message, numbers, stops=True)]

    def _entropy(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        entropy, first = metrics.get("train/entropy"), self.state["entropies"]
        if entropy is None:
            return []
        if len(first) < ENOUGH:
            first.append(entropy)
            return []
        level, limit = sum(first) / len(first), self.thresholds.entropy
        if not limit or entropy >= limit * level:
            return []
        message = (
            f"the entropy is {entropy:.4g} nats, {entropy / level:.1%} of what it began with: the policy has collapsed "
            f"(--alarms.entropy {limit:g})"
        )
        return [Event(step, "entropy", message, {"entropy": entropy, "first": level, "threshold": limit})]

    def _length(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        share, limit = metrics["response/truncated_share"], self.thresholds.length
        if not limit or share <= limit:
            return []
        message = f"{share:.0%} of the responses are cut at --max-response-len (--alarms.length {limit:g})"
        return [Event(step, "length", message, {"truncated_share": share, "threshold": limit})]
