"""The plugin Hydra loads: a grid sweeper that leaves no folder behind, and a launcher that plans first."""

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweep.launch.machine import LocalOptions
from sweep.launch.refused import in_our_words
from sweep.launch.register import SweepExit
from sweep.launch.slurm_options import SlurmOptions
from sweep.progress import silent


def refuse(key: str, value: str, fix: str) -> NoReturn:
    sys.stderr.write(f"{key}: {value} cannot run a sweep; choose {key}={fix}\n")
    raise SweepExit(2)


MAX_CELLS = 100_000
"""A grid is a list in memory, and a range is quickly typed with too many zeros."""


MANY_CELLS = 50
"""Hydra takes a tenth of a second for each: from so many on one is told how far it is."""


class GridSweeper(BasicSweeper):
    """Hydra's own grid. Its `sweep` would write multirun.yaml and compose every cell once more than needed."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if not isinstance(self.launcher, SweepLauncher):
            refuse("hydra/launcher", config.hydra.launcher._target_, "local")

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None
        return self.launcher.launch(self.grid(arguments), initial_job_idx=0)

    def grid(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each cell."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        if (n_cells := math.prod(map(n_choices, overrides))) > MAX_CELLS:
            raise HydraException(f"{' '.join(arguments)} asks for {n_cells:,.0f} cells; choose at most {MAX_CELLS:,}")
        for override in overrides:
            if override.is_interval_sweep():
                raise HydraException(f"{override.input_line}: a grid takes single values; write them with commas")
            if override.is_sweep_override() and next(override.sweep_string_iterator(), None) is None:
                raise HydraException(f"{override.input_line} stands for no value; write values with commas")
        (grid,) = self.split_arguments(overrides, None)
        return [list(cell) for cell in grid]

    def composed(self, arguments: list[str]) -> list[tuple[list[str], dict[str, Any] | str]]:
        """What the launcher would get to run, without running it."""
        assert isinstance(self.launcher, SweepLauncher)
        return [self.launcher.compose(overrides) for overrides in self.grid(arguments)]


def n_choices(override: Override) -> float:
    """How many values an override sweeps over, without listing them."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop = value.start or 0, value.stop or 0
        return max((stop - start) / value.step, 0) if value.step else math.inf
    return len(value.list) if isinstance(value, ChoiceSweep) else 1


class SweepLauncher(Launcher):
    """Composes every cell once and hands all of them to `sweep.launch.launch`."""

    def __init__(self, **options: Any) -> None:
        kind = SlurmOptions if options["backend"] == "slurm" else LocalOptions
        self.options = kind(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not str(config.hydra.sweeper._target_).endswith(GridSweeper.__name__):
            refuse("hydra/sweeper", config.hydra.sweeper._target_, "grid")
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the sweep and leave the process with its exit code."""
        from sweep.launch import console
        from sweep.launch.launch import launch

        composed = []
        with console.progress() if len(job_overrides) >= MANY_CELLS else nullcontext(silent) as report:
            for overrides in job_overrides:
                composed.append(self.compose(list(overrides)))
                report("read options", len(composed), len(job_overrides), "cells")
        raise SweepExit(launch(composed, self.options))

    def compose(self, overrides: list[str]) -> tuple[list[str], dict[str, Any] | str]:
        """The cell's overrides with its flat options, or with words on why there are none."""
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            options = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            plain = OmegaConf.to_container(options, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError, OverflowError) as error:
            return overrides, in_our_words(error)
        assert isinstance(plain, dict)
        return overrides, {str(key): value for key, value in plain.items()}
