"""Prints by how many bytes a preparation raises the peak memory of this process: `python -m … RECIPE OUT WARM-UP-RECIPE OUT`.

Counted is what is not a mapped file: the system takes those pages back when it needs them.
"""

import json
import re
import sys
import threading
from pathlib import Path

from data.prepare import prepare


class Peak:
    """The most memory seen in a look every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024)


if __name__ == "__main__":
    large, out, small, elsewhere = sys.argv[1:]
    with Peak() as before:
        prepare(small, elsewhere)
    with Peak() as after:
        store = prepare(large, out)
    documents = sum(record.documents for record in store.manifest.splits.values())
    print(json.dumps({"growth": after.bytes - before.bytes, "peak": after.bytes, "documents": documents}))
