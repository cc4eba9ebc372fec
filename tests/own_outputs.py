"""A plugin for `pytest --nbmake --numprocesses N`: the notebooks of each worker write to a folder of their own."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["LMSYS_OUTPUT"] = os.path.join(os.environ["LMSYS_OUTPUT"], os.environ["PYTEST_XDIST_WORKER"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
