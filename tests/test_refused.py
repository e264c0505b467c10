"""What Hydra refuses is told in our words, on one line: key, value and fix."""

import os

import pytest
from commands import sweep_runner as run

from sweep.errors import ConfigError
from sweep.launch.compose import cells_of


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("skip=maybe", "skip=maybe must be true or false"),
        ("skip=null", "skip=null must be true or false"),
        ("dict_size=1.5", "dict_size=1.5 must be a whole number"),
        ("dict_size=", "dict_size= must be a whole number"),
        ("++dict_size=a", "dict_size=a must be a whole number"),
        ("lr=[1]", "lr=[1] must be a number"),
        ("betas=[a,b]", "betas=[a,b] must be a list of numbers, such as [0.1,0.2]"),
        ("groups=3", "groups=3 must be a list of whole numbers, such as [1,2]"),
        ("baselines_dir=[1]", "baselines_dir=[1] must be text or null"),
        ("hydra.launcher.slots=x", "hydra.launcher.slots=x must be a whole number or null"),
        ("dict_sizee=4", "dict_sizee=4 is not an option; did you mean dict_size? See --help"),
        ("+dict_sizee=4", "dict_sizee=4 is not an option; did you mean dict_size? See --help"),
        ("model.path=x", "model.path=x is not an option; did you mean model_path? See --help"),
        ("hydra.launcher.slot=2", "hydra.launcher.slot=2 is not an option; did you mean hydra.launcher.slots? "
         "See --help"),
        ("hydra.nonsense=1", "hydra.nonsense=1 is not an option; see --help"),
        ("hydra/launcher=cloud", "hydra/launcher=cloud does not exist; choose one of inline, local, slurm"),
        ("schedule=fast", "schedule=fast does not exist; choose one of base, improved, tuned"),
        ("dict_size==3", "dict_size==3 cannot be read (extraneous input '='); quote a value with special characters: "
         "\"key='a=b'\""),
        ("lr=${oc.env:NOT_THERE}", 'lr: KeyError raised while resolving interpolation: '
         "\"Environment variable 'NOT_THERE' not found\""),
    ],
)  # fmt: skip
def test_a_refused_word_is_one_line_with_key_value_and_fix(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        cells_of(["model=tiny", word])
    assert str(refused.value) == message


def test_each_refused_value_of_a_grid_is_told() -> None:
    with pytest.raises(ConfigError) as refused:
        cells_of(["model=tiny", "lr=1e-3,a,b"])
    assert [line for line in str(refused.value).splitlines() if not line.startswith(" ")] == [
        "lr=a must be a number",
        "lr=b must be a number",
    ]


def test_whoever_asks_for_the_traceback_gets_it() -> None:
    done = run("lr=x", environment=os.environ | {"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Error merging override lr=x" in done.stderr
