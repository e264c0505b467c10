"""What a results folder says: rankings, effects, queries and a report over its Parquet files, without torch.

`python -m analysis --help` in a terminal; in a notebook `analysis.load("results")`. Polars is imported when something
is loaded, so that help comes at once.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    import polars

__all__ = ["load"]


def load(path: "str | PathLike[str]", table: str = "runs") -> "polars.LazyFrame":
    """A table of a results folder as a polars LazyFrame; what is left out of it is said in a warning.

    Args:
        path: the results_dir of a sweep.
        table: runs, curves, latents, sequences or contexts.

    Raises:
        ResultsError: `path` is not a results folder.
        ConfigError: there is no such table.
    """
    import warnings
    from pathlib import Path

    from analysis.tables import load_table

    loaded = load_table(Path(path), table)
    for line in loaded.warnings:
        warnings.warn(line, stacklevel=2)
    return loaded.frame
