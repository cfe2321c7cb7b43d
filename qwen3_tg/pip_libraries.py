"""Libraries of drivers and compilers that came with pip, which tinygrad looks for elsewhere: Dawn
for WebGPU, NVRTC and nvJitLink for NVIDIA. It takes their places from environment variables, once,
when it first needs them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

_KIND = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
# Dawn's wheel has all systems' libraries.
_DAWN = "libwebgpu_dawn" + (f"_{platform.machine()}" if os.name != "nt" else "") + _KIND
# Variable: the package that has it, its folder there, and the file's pattern. Wheels for CUDA 13
# have one folder for all.
_FILES = {
    "WEBGPU_PATH": (("pydawn", "lib", _DAWN),),
    "NVRTC_PATH": (
        ("nvidia", "cuda_nvrtc/lib", "libnvrtc.so.*"),
        ("nvidia", "cu13/lib", "libnvrtc.so.*"),
    ),
    "NVJITLINK_PATH": (
        ("nvidia", "nvjitlink/lib", "libnvJitLink.so.*"),
        ("nvidia", "cu13/lib", "libnvJitLink.so.*"),
    ),
}
# And of folders: that with the headers of CUDA in `include`.
_FOLDERS = {"CUDA_PATH": (("nvidia", "cuda_runtime", "include"), ("nvidia", "cu13", "include"))}


def point_tinygrad_to_them() -> None:
    """Set the variables that the user did not set."""
    for table in (_FILES, _FOLDERS):
        for variable, places in table.items():
            if variable not in os.environ and (found := next(_search(places), None)):
                is_file = table is _FILES
                os.environ[variable] = str(found if is_file else found.parent)


def _search(places: tuple[tuple[str, str, str], ...]) -> Iterator[Path]:
    for package, folder, pattern in places:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations if spec else None) or ():
            yield from sorted(Path(location, folder).glob(pattern))
