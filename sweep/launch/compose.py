"""The cells that overrides stand for, composed as a sweep would, without a sweep."""

from collections.abc import Sequence
from typing import Any, NoReturn

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweep.checkout import CONF
from sweep.config import Cell
from sweep.errors import ConfigError
from sweep.launch.plan import Composed, resolve
from sweep.launch.refused import in_our_words
from sweep.launch.register import register
from sweep.options import Workflow

__all__ = ["cells_of"]


def cells_of(overrides: Sequence[str]) -> tuple[Workflow, list[Cell]]:
    """The workflow and the cells of `python sweep_runner.py -m <overrides>`, in that order.

    Raises:
        ConfigError: with what that command would say.
    """
    workflow, cells = resolve(compose(overrides))
    return workflow, [cell for _, cell in cells]


def compose(overrides: Sequence[str]) -> list[Composed]:
    """Compose every cell with the configs and plugins of `sweep_runner.py`.

    Raises:
        ConfigError: they cannot be composed.
    """
    register()
    try:
        with initialize_config_dir(str(CONF), job_name="sweep_runner", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            config = hydra.compose_config("config", list(overrides), RunMode.MULTIRUN)
            sweeper: Any = Plugins.instance().instantiate_sweeper(
                config=config,
                hydra_context=HydraContext(hydra.config_loader, Callbacks()),
                task_function=never_called,
            )
            composed: list[Composed] = sweeper.composed(
                OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
            )
            return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_our_words(error)) from error


def never_called(_: Any) -> NoReturn:
    raise AssertionError("cells are composed, not run")
