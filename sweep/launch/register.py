"""Makes Hydra know our options, our launcher and our help, before `@hydra.main` runs."""

import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sweep.launch.help import help_text
from sweep.launch.machine import LocalOptions
from sweep.launch.slurm_options import SlurmOptions
from sweep.options import options_schema

__all__ = ["SweepExit", "register", "run"]


class SweepExit(SystemExit):
    """The end of a sweep with its own exit code; a plain SystemExit is Hydra's, for a command it refused."""


def run(main: Callable[[], None]) -> None:
    """Call Hydra's main, so that the exit code of a refused command is 2 and Ctrl-C leaves no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SweepExit:
        raise
    except SystemExit as stop:
        raise SystemExit(2 if stop.code == 1 else stop.code) from None


def register() -> None:
    """Idempotent. Hydra only takes plugins from a package called `hydra_plugins`, so a folder with one joins the
    end of the import path.
    """
    plugins = str(Path(__file__).parent / "_plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)
    ConfigStore.instance().store(name="options", node=options_schema())
    ConfigStore.instance().store(group="hydra/launcher", name="local_schema", node=LocalOptions)
    ConfigStore.instance().store(group="hydra/launcher", name="slurm_schema", node=SlurmOptions)
    OmegaConf.register_new_resolver("option_help", help_text, replace=True)
