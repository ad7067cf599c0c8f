"""What the library claims about speed, memory and accuracy, measured.

``python -m benchmarks`` (``make bench``) measures every operator on whatever the machine has.
"""

import os

# Read when PyTorch's profiler is loaded; it announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
