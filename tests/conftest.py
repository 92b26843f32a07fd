"""For every test: one thread (toy models gain nothing from more, and lose much when the cores are busy), every
shape written in a signature of composition is checked, and nothing is read from or kept in the user's own folder.

`--quick` (make check) leaves out what takes long: tests marked slow, those in a browser, those of bundled models and recipe, and of
the families of toys all but Stable Diffusion and FLUX, of the methods' laws all but Merge's and Composite's.
"""

import atexit
import os
import shutil
import tempfile
from functools import cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["MEDLEY_HOME"] = home = tempfile.mkdtemp(prefix="medley-tests-")  # never what a user keeps
atexit.register(shutil.rmtree, home, ignore_errors=True)

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shapes  # noqa: E402, F401  the hook looks it up in the package

torch.set_num_threads(1)
install_import_hook("composition", "tests.shapes.check")

QUICK_FAMILIES = {"sd", "flux"}
FAMILIES = {"sd", "sdxl", "sd3", "flux", "flux-dev"}
LONG = ("tests/assets/", "tests/app/", "tests/test_pocket", "tests/test_readme", "tests/gpu/", "tests/composition/devices/", "tests/composition/test_sessions",
        "tests/composition/test_training_cost", "tests/composition/test_batch")  # in the whole suite alone
QUICK_METHODS = {"merge", "composite"}  # whose laws are checked; of the others' tests those on FLUX


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what takes long: before every commit")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    quick = [item for item in items if is_quick(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(quick)])
    items[:] = quick


@cache
def every_method() -> tuple[str, ...]:
    from composition import methods

    return tuple(methods.all())


def is_quick(item) -> bool:
    """Whether `make check` runs it."""
    parameters = tuple(item.callspec.params.values()) if hasattr(item, "callspec") else ()
    families = {value for value in parameters if isinstance(value, str) and value in FAMILIES}
    path = item.path.relative_to(item.config.rootpath).as_posix()
    laws, methods = "test_laws.py" in path, path.startswith("tests/composition/methods/")
    if laws and {value for value in parameters if isinstance(value, str)} & (set(every_method()) - QUICK_METHODS) or methods and "sd" in families:
        return False
    return not (item.get_closest_marker("slow") or "browser" in item.fixturenames or path.startswith(LONG) or families - QUICK_FAMILIES)

