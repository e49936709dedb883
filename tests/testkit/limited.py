"""The trainer in a process whose files are limited to ``MOST_BYTES``: a disk that is full for large files."""

import os
import resource
import signal
import sys

from maestro_scale.train import main
from maestro_scale.training.distributed import hard_exit

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["MOST_BYTES"]),) * 2)
    sys.argv[0] = "train.py"
    hard_exit(main())
