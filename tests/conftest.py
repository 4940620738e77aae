"""Every test process computes on one thread: tiny tensors gain nothing from a second one, and
threads that wait for each other on a busy machine cost a factor of ten.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
