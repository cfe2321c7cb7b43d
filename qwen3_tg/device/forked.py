"""What a forked child must not use of its parent's: memory, drivers, and the cache of kernels.

tinygrad takes the CPU's buffers with MAP_SHARED: parent and child write to the same memory. A
driver's threads are not in the child, and it waits for them for ever. Where this module is loaded a
child begins without any of it; what a model of its own needs it takes anew.

Touches tinygrad's internals: an allocator's `cache`, `LRU`, and the connection to its database.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from qwen3_tg.device.missing import Missing
from qwen3_tg.device.names import family

_opened_by_parent: set[str] = set()  # kinds of devices whose drivers it uses
_parents: list[object] = []  # not to be closed here


def problem_after_fork(name: str) -> Missing | None:
    """Why a device cannot be used in this process, where that is because of a fork."""
    if family(name) not in _opened_by_parent:
        return None
    return Missing(
        "its driver was started in the process that this one was forked from, and works in that "
        'one alone; start processes with multiprocessing.get_context("spawn")'
    )


def _begin_child() -> None:
    if "tinygrad.device" not in sys.modules:
        return
    from tinygrad import helpers
    from tinygrad.device import ALL_DEVICES, Device

    for name in Device._opened_devices:
        if family(name) == "CPU":
            device: Any = Device[name]
            device.allocator.cache.clear()
        elif family(name) in ALL_DEVICES:  # the others are files and Python's own memory
            _opened_by_parent.add(family(name))
    # Buffers of the parent's are freed here too, and must not be kept for others.
    helpers.LRU.value = 0
    # "Do not open an SQLite database connection, then fork, then try to use it in the child":
    # sqlite.org/howtocorrupt.html, 2.6
    _parents.append(helpers._db_connection)
    helpers._db_connection = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
