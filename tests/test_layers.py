"""Who may import whom, read off the source: data flows one way, and start-up stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from modules import OURS, modules

LAYERS: list[set[str]] = [
    {
        "sweep",
        "sweep.checkout",
        "sweep.errors",
        "sweep.locks",
        "sweep.progress",
        "sweep.pulse",
        "sweep.recovered",
        "sweep.secrets",
        "sweep.stdout",
        "sweep.chunks",
    },
    {"sweep.revisions", "sweep.failures"},
    {"sweep.config", "sweep.paths"},
    {"sweep.attempt"},
    {"sweep.options", "sweep.status", "sweep.provenance", "sweep.summary"},
    {
        "sweep.results",
        "sweep.text",
        "sweep.baselines",
        "sweep.baselines.published",
        "sweep.baselines.npz",
        "sweep.baselines.family",
    },
    {"sweep.baselines.hub", "sweep.baselines.header", "sweep.leftovers"},
    {"sweep.processor", "sweep.devices"},
    {"sweep.tokens", "sweep.model_files", "sweep.transcoder"},
    {"sweep.cached", "sweep.schedule", "sweep.epochs", "sweep.baselines.wanted"},
    {"sweep.cache"},
    {"sweep.language_model", "sweep.state", "sweep.baselines.gemma_scope"},
    {
        "sweep.activations",
        "sweep.step",
        "sweep.step.loss",
        "sweep.step.update",
        "sweep.step.entries",
        "sweep.checkpoint",
        "sweep.metrics",
        "sweep.contexts",
    },
    {"sweep.block_files", "sweep.step.bounds", "sweep.similarity"},
    {"sweep.step.bfloat16", "sweep.step.int8"},
    {"sweep.step.screen", "sweep.step.shortlist"},
    {"sweep.step.revive"},
    {"sweep.step.active"},
    {
        "sweep.step.reference",
        "sweep.step.sparse",
        "sweep.blocks",
        "sweep.initialise",
        "sweep.saved",
        "sweep.foreign",
    },
    {"sweep.refit", "sweep.step.step", "sweep.causal"},
    {"sweep.finish", "sweep.train", "sweep.evaluate"},
    {"sweep.gang"},
    {"sweep.commit"},
    {"sweep.beside"},
    {"sweep.job"},
    {"sweep.score", "sweep.prepare"},
    {"sweep.compare"},
    {
        "sweep.launch",
        "sweep.launch.help",
        "sweep.launch.plan",
        "sweep.launch.claims",
        "sweep.launch.cost",
        "sweep.launch.machine",
        "sweep.launch.squeue",
    },
    {"sweep.launch.slurm_options", "sweep.launch.jobs", "sweep.launch.payload", "sweep.launch.beside"},
    {"sweep.launch.endings", "sweep.launch.refused"},
    {
        "sweep.launch.register",
        "sweep.launch.console",
        "sweep.launch.local",
        "sweep.launch.slurm",
    },
    {"sweep.launch.watch", "sweep.launch.compose", "sweep.launch.outcome"},
    {"sweep.launch.rounds", "sweep.launch.folder", "sweep.launch.elsewhere"},
    {"sweep.launch.launch"},
    {"sweep.launch._plugins.hydra_plugins.sweep_launcher", "sweep_runner", "sweep.__main__"},
]
"""Low to high: a module imports only from layers below its own, or its neighbours where NEIGHBOURS says so."""

NEIGHBOURS = {("sweep.step.loss", "sweep.step")}

TORCH_FREE = {
    module
    for layer in LAYERS
    for module in layer
    if (module.startswith(("sweep.launch", "sweep.baselines")) and module != "sweep.baselines.gemma_scope")
    or module
    in {
        "sweep", "sweep_runner", "sweep.checkout", "sweep.errors", "sweep.locks", "sweep.progress", "sweep.revisions",
        "sweep.config", "sweep.paths",
        "sweep.attempt", "sweep.leftovers", "sweep.cached", "sweep.cache", "sweep.failures", "sweep.pulse",
        "sweep.options", "sweep.status", "sweep.provenance", "sweep.summary", "sweep.results", "sweep.schedule",
        "sweep.epochs",
        "sweep.recovered", "sweep.secrets", "sweep.stdout", "sweep.text", "sweep.tokens", "sweep.saved",
        "sweep.__main__",
    }
}  # fmt: skip
HEAVY = {"torch", "transformer_lens", "transformers", "datasets", "safetensors.torch"}

ANALYSIS_MAY_USE = {"sweep.results", "sweep.config", "sweep.options", "sweep.paths", "sweep.errors", "sweep.baselines",
                    "sweep.baselines.published", "sweep.checkout", "sweep.recovered", "sweep.stdout"}  # fmt: skip


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules a file imports; at run time and at its top level, or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(top_level(tree)) if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(tree: ast.AST) -> list[ast.AST]:
    """Statements that run on import: not in functions, not under TYPE_CHECKING."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *top_level(node)]
    return found


def level(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    assert {module for layer in LAYERS for module in layer} == set(OURS)


@pytest.mark.parametrize("module", sorted(OURS))
def test_modules_import_only_from_lower_layers(module: str) -> None:
    used = {name for name in imports(OURS[module]) if name in OURS}
    if module in ("sweep.launch.rounds", "sweep.launch.payload"):
        used -= {"sweep.job"}  # imported in the body of what runs it
    wrong = {name for name in used if level(name) >= level(module) and (module, name) not in NEIGHBOURS}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", sorted(TORCH_FREE) + sorted(modules("analysis")))
def test_light_modules_import_nothing_heavy(module: str) -> None:
    path = OURS.get(module) or modules("analysis")[module]
    heavy = {name for name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY or name in HEAVY}
    not_light = {name for name in imports(path, top_level_only=True) if name in set(OURS) - TORCH_FREE}
    assert not heavy | not_light


@pytest.mark.parametrize("module", sorted(modules("analysis")))
def test_analysis_uses_only_names_and_schema(module: str) -> None:
    used = {name for name in imports(modules("analysis")[module]) if name in OURS}
    assert used <= ANALYSIS_MAY_USE | {"sweep"}


@pytest.mark.parametrize("module", ["sweep_runner", "analysis", "sweep.launch.launch"])
def test_start_up_loads_no_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    everything = modules("sweep", "analysis") | {"sweep_runner": ROOT / "sweep_runner.py"}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in everything.items()}
    assert lines["sweep_runner"] < 50
    assert max(lines.values()) <= 400, max(lines, key=lambda name: lines[name])


UNPICKLERS = {"pickle", "joblib", "dill", "cloudpickle", "yaml"}


@pytest.mark.parametrize("module", sorted(OURS))
def test_no_foreign_object_is_unpickled_or_instantiated(module: str) -> None:
    tree = ast.parse(OURS[module].read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    unpicklers = {name for name in imports(OURS[module]) if name.split(".")[0] in UNPICKLERS}
    forbidden = {"torch.save", "hydra.utils", "eval", "exec", "instantiate"}
    if module in ("sweep.foreign", "sweep.language_model"):  # torch reads with weights_only; they name its error
        assert unpicklers <= {"pickle", "pickle.UnpicklingError"} and not {name for name in names if "pickle." in name}
    else:
        assert not unpicklers
        forbidden |= {"torch.load"}
    assert not names & forbidden
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "np.load":
            assert "allow_pickle=False" in ast.unparse(call)
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(call)
        assert "trust_remote_code=True" not in ast.unparse(call)


def test_broad_excepts_stand_in_job_and_gang_only() -> None:
    def broad(module: str) -> bool:
        handlers = [n for n in ast.walk(ast.parse(OURS[module].read_text())) if isinstance(n, ast.ExceptHandler)]
        reraised = [h for h in handlers if h.type is None or ast.unparse(h.type) in ("Exception", "BaseException")]
        return any(not isinstance(handler.body[-1], ast.Raise) for handler in reraised)

    assert {module for module in OURS if broad(module)} == {"sweep.job", "sweep.gang"}
