"""For every test: one thread. Toy models gain nothing from more, and lose much when the cores are busy."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
