"""For every test: one thread (toy models gain nothing from more, and lose much when the cores are busy), and nothing is read from or kept
in the user's own folder. The shapes written in composition's signatures are checked in one test of CHECKED, since checking takes a third of
a toy's run, and wherever a test says so (test_laws.test_shapes: every method on every family).

`--quick` (make check) leaves out what takes long: tests marked slow, those in a browser, those of bundled models and recipe, and of
the families of toys all but Stable Diffusion and FLUX, of the methods' laws all but Merge's and Composite's.
"""

import atexit
import os
import shutil
import signal
import tempfile
import zlib
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["MEDLEY_HOME"] = home = tempfile.mkdtemp(prefix="medley-tests-")  # never what a user keeps
atexit.register(shutil.rmtree, home, ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import config as shapes  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shapes  # noqa: E402, F401  the hook looks it up in the package

for stop, answer in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if stop is not None and signal.getsignal(stop) is signal.SIG_IGN:  # as for a command in the background: tests of Ctrl-C send it to themselves
        signal.signal(stop, answer)
torch.set_num_threads(1)
install_import_hook("composition", "tests.shapes.check")

CHECKED = 4  # of so many tests, one checks shapes; which ones, their names say, so that it is the same ones every time
QUICK_FAMILIES = {"sd", "flux"}
FAMILIES = {"sd", "sdxl", "sd3", "flux", "flux-dev"}
LONG = ("tests/assets/", "tests/app/", "tests/test_pocket", "tests/test_readme", "tests/gpu/", "tests/composition/devices/", "tests/composition/test_sessions",
        "tests/composition/test_training", "tests/composition/test_batch", "tests/composition/backbones/test_quantize", "tests/composition/methods/test_clora",
        "tests/faults/", "tests/hostile/")  # in the whole suite alone
FIRST = ("tests/assets/test_recipe_all", "tests/composition/test_laws", "tests/test_pocket", "tests/composition/devices", "tests/test_readme", "tests/gpu/",
         "tests/composition/test_training_cost")  # the longest files, so that no core waits for one at the end
QUICK_METHODS = {"merge", "composite"}  # whose laws are checked; of the others' tests those on FLUX
QUICK_SAMPLERS = {"default", "ddim", "heun"}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what takes long: before every commit")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not path_of(item).startswith(FIRST))
    if not config.getoption("--quick"):
        return
    quick = [item for item in items if is_quick(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(quick)])
    items[:] = quick


@cache
def every_method() -> tuple[str, ...]:
    from composition import methods

    return tuple(methods.all())


@cache
def every_sampler() -> tuple[str, ...]:
    from composition.backbones import schedulers

    return tuple(schedulers.NAMES)


def is_quick(item) -> bool:
    """Whether `make check` runs it."""
    values = {value for parameter in parameters_of(item) for value in (parameter if isinstance(parameter, tuple) else (parameter,)) if isinstance(value, str)}
    families = values & FAMILIES
    path = path_of(item)
    if "test_laws.py" in path and values & (set(every_method()) - QUICK_METHODS | set(every_sampler()) - QUICK_SAMPLERS):
        return False
    if path.startswith("tests/composition/methods/") and "sd" in families:
        return False
    return not (item.get_closest_marker("slow") or "browser" in item.fixturenames or path.startswith(LONG) or families - QUICK_FAMILIES)


def path_of(item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


def parameters_of(item) -> tuple:
    return tuple(item.callspec.params.values()) if hasattr(item, "callspec") else ()


@pytest.fixture
def shapes_unchecked():
    """Without the check of shapes, which is no part of what is compiled."""
    shapes.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        shapes.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def some_shapes_checked(request):
    if request.node.originalname != "test_shapes" and zlib.crc32(request.node.nodeid.encode()) % CHECKED:
        request.getfixturevalue("shapes_unchecked")


@pytest.fixture(autouse=True)
def gates_for_toys(monkeypatch):
    """AutoLoRA without a file takes drawn gates for whatever toy it runs on: no gates are bundled with toys."""
    from composition.bundled import BUNDLES
    from composition.methods import autolora
    from tests.gates import drawn_gates

    honest = autolora.gates_of
    monkeypatch.setattr(autolora, "gates_of", lambda run, file: honest(run, file) if file or run.request.model in BUNDLES else drawn_gates(run))
