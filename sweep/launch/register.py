"""Makes Hydra know our options, our launcher and our help, before `@hydra.main` runs."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweep import stdout
from sweep.launch.help import help_text
from sweep.launch.machine import LocalOptions
from sweep.launch.refused import in_our_words
from sweep.launch.slurm_options import SlurmOptions
from sweep.options import options_schema

__all__ = ["SweepExit", "register", "run"]


class SweepExit(SystemExit):
    """The end of a sweep with its own exit code; a plain SystemExit is Hydra's, for a command it refused."""


def run(main: Callable[[], None]) -> None:
    """Call Hydra's main, so that a refused command ends with our words and exit code 2, and Ctrl-C without a traceback.

    Hydra prints its errors itself, unless told to raise them. Whoever set HYDRA_FULL_ERROR=1 gets the traceback.
    """
    whole = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        stdout.silence()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if whole or not is_hydras(error):
            raise
        sys.stderr.write(in_our_words(error) + "\n")
        raise SystemExit(2) from None
    except SweepExit:
        raise
    except SystemExit as stop:
        raise SystemExit(2 if stop.code == 1 else stop.code) from None


def is_hydras(error: Exception) -> bool:
    """Whether Hydra refuses: by an exception of its own, or by a plain one, raised in its code."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "hydra"


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
