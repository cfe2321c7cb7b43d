"""Which device to compute on, in which types, and why; the only room that knows device names.

tinygrad brings the devices. `found` says which of them work here, `missing` what those lack that do
not, `policy` how the model runs on one, `memory` what room it has.
"""

from qwen3_tg.device.found import DeviceReport, as_default, describe, formats_of, report, reports
from qwen3_tg.device.memory import (
    Memory,
    check_memory,
    free_memory,
    free_unused,
    memory_of,
    shares_scratch,
    takes_read_only,
)
from qwen3_tg.device.missing import Missing
from qwen3_tg.device.names import DTYPE_NAMES, KERNELS, KV_DTYPE_NAMES
from qwen3_tg.device.policy import (
    Policy,
    check_single,
    choose,
    imagined,
    own_kernels,
    shares_memory,
    working_policies,
)

__all__ = [
    "DTYPE_NAMES",
    "KERNELS",
    "KV_DTYPE_NAMES",
    "DeviceReport",
    "Memory",
    "Missing",
    "Policy",
    "as_default",
    "check_memory",
    "check_single",
    "choose",
    "describe",
    "formats_of",
    "free_memory",
    "free_unused",
    "imagined",
    "memory_of",
    "own_kernels",
    "report",
    "reports",
    "shares_memory",
    "shares_scratch",
    "takes_read_only",
    "working_policies",
]
