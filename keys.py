"""Variables of the environment that hold keys: rewards are not told them, and nothing that a run writes holds them."""

import os
import re
from collections.abc import Mapping

_KEY = re.compile(
    r"(?:^|_)(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|PRIVATE|SECRET|AUTH)_?KEYS?)(?:_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8  # characters; a shorter value (0, true) is no key, and may stand anywhere


def is_key(name: str) -> bool:
    """Whether a variable is named like a key: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, DB_PASSWORD."""
    return _KEY.search(name) is not None


def without_keys(environment: Mapping[str, str], keep: tuple[str, ...] = ()) -> dict[str, str]:
    """`environment` without what is named like a key, but for the names in `keep`."""
    return {name: value for name, value in environment.items() if name in keep or not is_key(name)}


def keys_in(text: str) -> dict[str, str]:
    """name -> value of the keys of this process's environment whose value stands in `text`."""
    return {k: v for k, v in os.environ.items() if is_key(k) and len(v) >= _SHORTEST and v in text}


def redacted(text: str) -> str:
    """`text` with [NAME] where the value of a key stood."""
    for name, value in keys_in(text).items():
        text = text.replace(value, f"[{name}]")
    return text
