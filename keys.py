"""Variables of the environment that hold keys: rewards are not told them, and nothing that a run writes holds them."""

import os
import re
from collections.abc import Mapping
from typing import Any

_KEY = re.compile(
    r"(?:^|_)(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|PRIVATE|SECRET|AUTH)_?KEYS?)(?:_|$)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?<=://)[^/?#\s@]+(?=@)")  # user:password in an address
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
    """`text` with [NAME] where the value of a key stood, and *** for what stands before the @ of an address."""
    for name, value in sorted(keys_in(text).items(), key=lambda key: -len(key[1])):  # one may begin another
        text = text.replace(value, f"[{name}]")
    return _ADDRESS.sub("***", text)


def without_secrets(value: Any) -> Any:
    """The same text, or dicts and lists of it, redacted."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    return redacted(value) if isinstance(value, str) else value
