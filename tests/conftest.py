"""For every test: one thread (toy models gain nothing from more, and lose much when the cores are busy), every
shape written in a signature of composition is checked, and nothing is read from or kept in the user's own folder."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["MEDLEY_HOME"] = home = tempfile.mkdtemp(prefix="medley-tests-")  # never what a user keeps
atexit.register(shutil.rmtree, home, ignore_errors=True)

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shapes  # noqa: E402, F401  the hook looks it up in the package

torch.set_num_threads(1)
install_import_hook("composition", "tests.shapes.check")

