"""What must not end up in a file: the values of secrets in the environment, and who a URL logs in as."""

import os
import re

__all__ = ["without_secrets"]

SECRET = re.compile(r"TOKEN|SECRET|PASS(WORD|WD)|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
"""How such variables are named."""

MIN_CHARACTERS = 8
"""Shorter values, such as `false`, are words of their own."""

LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def without_secrets(text: str) -> str:
    """The text with `$HF_TOKEN` in place of that variable's value, and so on, and `***` in place of logins in URLs."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= MIN_CHARACTERS:
            text = text.replace(value, f"${name}")
    return LOGIN.sub("***", text)
