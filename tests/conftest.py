"""For every test: one thread (toy models gain nothing from more, and lose much when the cores are busy), and every
shape written in a signature of composition is checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shapes  # noqa: E402, F401  the hook looks it up in the package

torch.set_num_threads(1)
install_import_hook("composition", "tests.shapes.check")
