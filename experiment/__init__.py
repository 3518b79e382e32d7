"""What train.py and eval.py share: settings, data, checkpoints, training, measuring, results."""

import gc

collects = gc.isenabled()
gc.disable()  # to look for garbage among what an import makes, all of which stays, takes a fifth of the time to start
import numba  # noqa: E402, F401
import torch  # noqa: E402, F401

if collects:
    gc.enable()
