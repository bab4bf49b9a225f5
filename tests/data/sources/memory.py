"""Prints by how many bytes reading a source raises the peak memory of this process: `python -m … FIELDS WARM-UP`, both JSON.

The fields of a second, small source of the same kind come first, so that what is loaded once does not count.
"""

import json
import re
import sys
from pathlib import Path

import pyarrow
from pydantic import TypeAdapter

from data.documents import Unreadable
from data.sources import Source, inputs, read_input


def peak() -> int:
    """Bytes resident at most so far. (`ru_maxrss` would also count the parent before it started this.)"""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def read(fields: str) -> dict[str, int]:
    source = TypeAdapter(Source).validate_python({"name": "it", "max_unreadable": 1, **json.loads(fields)})
    size = documents = unreadable = 0
    for item in inputs(source):
        for record in read_input(source, item):
            if isinstance(record, Unreadable):
                unreadable += 1
            else:
                documents += 1
                size += len(record.text)
            del record
    return {"documents": documents, "unreadable": unreadable, "characters": size}


if __name__ == "__main__":
    # pyarrow's own allocator keeps tens of megabytes that are free; this one gives them back.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    large, small = sys.argv[1:]
    read(small)
    before = peak()
    print(json.dumps({**read(large), "growth": peak() - before}))
