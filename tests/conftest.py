"""Strict settings for every test, and the choice of the tests that run by default."""

from __future__ import annotations

import gc

import environment  # noqa: F401, the first of all: it sets what JAX reads when it is imported
import hypothesis
import jax
import pytest

# [B, 1] + [B] is nearly always a mistake, as all arrays here carry a batch axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("strict", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("strict")

OPTIONAL_MARKERS = {
    "reference": "needs torch and transformers: pytest -m reference, in an environment with the group of that name",
    "tpu": "compiles for a TPU that need not be there: pytest -m tpu, in an environment with the group of that name",
    "cuda": "compiles for GPUs that need not be there: pytest -m cuda, see docs/howto_gpu_tpu.md",
}
SLOW = "takes many seconds, and quicker tests beside it cover the same code: .ci/full runs it, as pytest --slow does"
LEFT_OUT = pytest.StashKey[list[pytest.Item]]()


def slow(*values: object) -> object:
    """Return the parameters of a slow case, for `pytest.mark.parametrize`."""
    return pytest.param(*values, marks=pytest.mark.slow)


LONGEST = (
    "test_mesh", "test_golden", "test_loop", "test_packed", "test_generate", "test_gpu_kernels", "test_few_rows",
    "test_own_layers", "test_decode_cli", "test_docs", "test_drafted_models", "test_exit_training", "test_train_cli",
    "test_rivals", "test_trained_exits", "test_default_exits", "test_contributing", "test_distributed",
)  # fmt: skip
"""The test files that run first, as they take minutes: one of them at the end would leave the other worker idle."""

OWN_MODULES = r"(dex_jax|studies|test_|conftest|reference)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    for name, description in {**OPTIONAL_MARKERS, "slow": SLOW}.items():
        config.addinivalue_line("markers", f"{name}: {description}")
    # Warnings that point at our own lines are errors; those inside other packages are theirs to mend.
    config.addinivalue_line("filterwarnings", f"error:::{OWN_MODULES}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave out optional and slow tests that the command line does not request.

    With -m pytest chooses the tests alone. --slow requests all slow tests, and arguments that all name tests these.
    """
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    config.stash[LEFT_OUT] = left_out = []
    if config.getoption("markexpr"):
        return
    all_slow = config.getoption("slow") or all("::" in argument for argument in config.args)
    leave_out = {*OPTIONAL_MARKERS, *(() if all_slow else ("slow",))}
    left_out += [item for item in items if any(item.get_closest_marker(name) for name in leave_out)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def smollm2():
    """Return the default model, in float32 on any device."""
    import dex_jax

    return dex_jax.load("smollm2-135m", dtype="float32")


@pytest.fixture
def steady_ticks(monkeypatch, tmp_path):
    """Let ticks choose their rows by no clock and by nothing that other tests have learnt, and keep nothing."""
    from reference.steady_ticks import steady_seconds

    from dex_jax.decoding import costs
    from dex_jax.decoding.session import Session

    monkeypatch.setenv("DEX_JAX_TICK_COSTS", str(tmp_path / "none.json"))
    monkeypatch.setattr(costs.TickCosts, "keep", lambda costs: None)
    monkeypatch.setattr(costs, "_LEARNT", {})
    monkeypatch.setattr(Session, "_seconds", steady_seconds)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop the programs of a test file: the next one does not use them, and LLVM aborts a process with too many."""
    yield
    from dex_jax.decoding.program import forget

    forget()
    jax.clear_caches()
    gc.collect()
