"""Makes Hydra know our options, our launcher and our help, before `@hydra.main` runs."""

import sys
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sweep.launch.help import help_text
from sweep.options import options_schema

__all__ = ["register"]


def register() -> None:
    """Idempotent. Hydra only takes plugins from a package called `hydra_plugins`, so a folder with one joins the
    end of the import path.
    """
    plugins = str(Path(__file__).parent / "_plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)
    ConfigStore.instance().store(name="options", node=options_schema())
    OmegaConf.register_new_resolver("option_help", help_text, replace=True)
