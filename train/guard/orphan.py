"""A process ends with the launcher that started it: one that outlived it would hold its GPU, its port and the run's folder."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def die_with_launcher() -> None:
    """Ask the kernel for SIGKILL when the launcher's process ends; started by hand, a run has no launcher."""
    if "RANK" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it has ended in between
        os.kill(os.getpid(), signal.SIGKILL)
