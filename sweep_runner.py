"""Train and evaluate a grid of sparse transcoders: python sweep_runner.py -m dict_size=64,128 top_k=4,8"""

from typing import Any

import hydra

from sweep.launch.register import register, run

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(_: Any) -> None:
    """Never called: `hydra.mode` is MULTIRUN, so the launcher plugin does the work, with or without -m."""
    raise AssertionError("hydra.mode must be MULTIRUN")


if __name__ == "__main__":
    run(main)
