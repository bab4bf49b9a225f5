"""The one server that forks the tests' processes. It has no threads, so that forking is safe beside those of the test process."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.preload"])
