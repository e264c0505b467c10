"""Presets of conf/ recognised in a run by its values, whatever was typed."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from analysis.rows import Row
from sweep.checkout import CONF
from sweep.config import frozen
from sweep.options import ABSOLUTE, Relative, absolute

__all__ = ["decides", "has_preset", "preset"]


@cache
def preset(group: str, name: str) -> Mapping[str, Any]:
    """The options that a preset of conf/ sets, those of the presets it builds on included.

    Raises:
        FileNotFoundError: there is no such preset.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    values: dict[str, Any] = {}
    for below in content.pop("defaults", []):
        if below != "_self_":
            values |= preset(group, below)
    return {**values, **content}


def has_preset(row: Row, values: Mapping[str, Any]) -> bool:
    """Whether a run has the values that the options of a preset would have given it."""
    wanted = {**row, **values}
    relative = {name: wanted.get(name, 0.0) for name in ABSOLUTE.values()}
    for name, fraction in ABSOLUTE.items():
        if fraction in values and name not in values:
            wanted[name] = None
    absolute(wanted, Relative(**{**relative, "group_fractions": frozen(wanted.get("group_fractions", []))}))
    return all(_close(row[name], wanted[name]) for name in decides(values))


def decides(values: Mapping[str, Any]) -> set[str]:
    """The options of a cell that the values of a preset decide: an absolute one for each relative one."""
    followers = {fraction: name for name, fraction in ABSOLUTE.items()}
    return {followers.get(name, name) for name in values}


def _close(value: Any, wanted: Any) -> bool:
    """Equal, up to the last digits of a float."""
    if isinstance(value, list | tuple):
        return len(value) == len(wanted) and all(map(_close, value, wanted))
    if isinstance(value, float):
        return math.isclose(value, wanted, rel_tol=1e-9)
    return bool(value == wanted)
