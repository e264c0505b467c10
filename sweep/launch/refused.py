"""What Hydra refuses, in our words: key, value and fix, on one line."""

import re
import sys
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sweep.launch.help import GROUPS, presets_of
from sweep.launch.machine import LocalOptions
from sweep.launch.slurm_options import SlurmOptions
from sweep.options import must_be, not_an_option, option_fields

__all__ = ["in_our_words"]

TYPED = re.compile(r"Error merging override (.*)|To append to your config use \+(.*)")
"""Where Hydra repeats what was typed."""

NOT_A_NAME = "Config group override must be a string or a list."
NO_LAUNCHER = "Hydra launcher is not configured"


def in_our_words(error: Exception) -> str:
    """One line about an error of Hydra or OmegaConf; in its own words where we have none."""
    if plain := of_a_plain_error(str(error)):
        return plain
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        presets = [option for option in error.options if option != "basic" and not option.endswith("_schema")]
        return f"{group}={name} does not exist; choose one of {', '.join(presets)}"
    if isinstance(error, OverrideParseException):
        words = [line for line in error.message.splitlines() if not line.startswith("Error parsing override")]
        reason = words[0].partition(" expecting ")[0] if words else "no option=value"
        return f"{error.override} cannot be read ({reason}); quote a value with special characters: \"key='a=b'\""
    if isinstance(error, HydraException) and (typed := TYPED.search(str(error))):
        key, _, value = (typed[1] or typed[2]).lstrip("+").partition("=")
        types = _types()
        return must_be(key, value, types[key]) if key in types else not_an_option(key, value, types)
    if isinstance(cause := error.__cause__ or error, OmegaConfBaseException) and cause.full_key:
        return of_a_value(cause)
    return " ".join(f"{error} {error.__cause__ or ''}".split())


def of_a_value(error: OmegaConfBaseException) -> str:
    """Of one whose key OmegaConf names."""
    if isinstance(error, MissingMandatoryValue):
        taken_away = " ".join(word for word in sys.argv if word.startswith("~"))
        return f"{error.full_key} is missing; " + (f"leave {taken_away} out" if taken_away else "give it a value")
    return f"{error.full_key}: {str(error).partition('full_key:')[0]}".strip()


def of_a_plain_error(text: str) -> str:
    """Of those that Hydra raises without a class of its own, and without the key; empty for any other."""
    if text.startswith(NOT_A_NAME):
        typed = [(group, value) for group, _, value in (word.partition("=") for word in sys.argv) if group in GROUPS]
        wrong = [(group, value) for group, value in typed if not {*value.split(",")} <= {*presets_of(group)}]
        choices = {group: ", ".join(presets_of(group)) for group, _ in wrong}
        return "; ".join(f"{group}={value} is no preset; choose one of {choices[group]}" for group, value in wrong)
    if text == NO_LAUNCHER:
        return "hydra.launcher=null leaves nothing to run jobs with; choose hydra/launcher=local, slurm or inline"
    return ""


def _types() -> dict[str, Any]:
    """Of everything one types as key=value, presets left out."""
    types = {name: hint for _, name, hint, _ in option_fields()}
    for kind in (LocalOptions, SlurmOptions):
        types |= {f"hydra.launcher.{name}": hint for name, hint in get_type_hints(kind).items() if name[0] != "_"}
    return types
