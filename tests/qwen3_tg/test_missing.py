"""What a device that does not work lacks: named, with the command that gets it on each system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen3_tg.device import missing
from qwen3_tg.device.missing import AMD, INTEL, NVIDIA, after_failing, before_opening

SYSTEMS = ("macos", "debian", "fedora", "arch", "windows")


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(missing, "system", lambda: request.param)
    return str(request.param)


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPUs."""
    monkeypatch.setattr(missing, "_SYS", tmp_path)
    monkeypatch.setattr(missing, "_WSL", tmp_path / "dxg")
    monkeypatch.setattr(sys, "platform", "linux")
    files = {
        kind: ((str(tmp_path / kind),), *rest) for kind, (_, *rest) in missing._HARDWARE.items()
    }
    monkeypatch.setattr(missing, "_HARDWARE", files)
    return tmp_path


def plug_in(pci: Path, maker: str, kind: str = "0x030000") -> None:
    folder = pci / "bus/pci/devices" / f"0000:{maker}"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{maker}\n")
    (folder / "class").write_text(f"{kind}\n")


def no_library(name: str) -> AttributeError:
    """As tinygrad's DLL says it."""
    return AttributeError(f"failed to load library {name}: try setting {name.upper()}_PATH?")


def test_a_cpu_without_a_compiler_is_told_how_to_get_clang(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing.compiler, "find_compiler", lambda: None)
    found = before_opening("CPU")
    assert found is not None and "clang" in found.what and "ziglang" in found.what
    words = {"macos": "xcode-select", "debian": "apt", "fedora": "dnf", "arch": "pacman"}
    assert words.get(system, "winget") in found.command


def test_hardware_that_is_not_there_is_said_and_cannot_be_installed(pci: Path, system: str) -> None:
    for name, what in (("AMD", "AMD GPU"), ("NV", "NVIDIA GPU"), ("QCOM", "Adreno GPU")):
        found = before_opening(name)
        assert found is not None and (found.what, found.command) == (
            f"no {what} in this machine",
            "",
        )
    assert after_failing("CUDA", no_library("cuda")).what == "no NVIDIA GPU in this machine"


@pytest.mark.parametrize("name", ["NV", "CUDA"])
def test_an_nvidia_gpu_without_its_driver_is_told_how_to_get_it(
    pci: Path, system: str, name: str
) -> None:
    plug_in(pci, NVIDIA)
    found = before_opening("NV") if name == "NV" else after_failing("CUDA", no_library("cuda"))
    assert found is not None and "NVIDIA" in found.what and "driver" in found.what
    assert ("nvidia" in found.command.lower()) == (system != "macos")


def test_an_amd_gpu_that_may_not_be_used_is_told_of_the_group(
    pci: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pci / "AMD").write_text("")
    assert before_opening("AMD") is None
    monkeypatch.setattr(missing, "_may_use", lambda file: False)
    found = before_opening("AMD")
    assert found is not None and "no permission" in found.what and "usermod" in found.command


def test_an_amd_gpu_without_a_compiler_is_told_of_llvm(system: str) -> None:
    error = ExceptionGroup("No renderer", [AttributeError("failed to load library llvm: ...")])
    found = after_failing("AMD", error)
    assert "compiler" in found.what
    assert ("llvm" in found.command) == (system != "windows")


def test_opencl_is_told_of_the_loader_and_then_of_the_driver_of_the_gpu(
    pci: Path, system: str
) -> None:
    found = after_failing("CL", no_library("opencl"))
    assert "loader" in found.what and bool(found.command) == (system != "macos")
    no_platform = RuntimeError("OpenCL Error -1001: Unknown error")
    assert after_failing("CL", no_platform).command == ""
    plug_in(pci, AMD, "0x040300")  # a sound device
    assert after_failing("CL", no_platform).command == ""
    plug_in(pci, INTEL)
    found = after_failing("CL", no_platform)
    assert "OpenCL driver" in found.what
    assert ("intel" in found.command) == (system in ("debian", "fedora", "arch"))


def test_webgpu_is_told_of_dawn_and_then_of_vulkan(system: str) -> None:
    found = after_failing("WEBGPU", no_library("webgpu"))
    assert "Dawn" in found.what and "-m pip install dawn-python" in found.command
    found = after_failing("WEBGPU", RuntimeError("[Unavailable]No supported adapters"))
    assert "Vulkan" in found.what and "No supported adapters" in found.what
    assert ("vulkan" in found.command) == (system in ("debian", "fedora", "arch"))


def test_metal_is_of_macos_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    found = before_opening("METAL")
    assert found is not None and "macOS" in found.what and not found.command


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n', "debian"),
        ("ID=debian\n", "debian"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "debian"),
        ("ID=fedora\n", "fedora"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "fedora"),
        ("ID=endeavouros\nID_LIKE=arch\n", "arch"),
        ("ID=nixos\n", "linux"),
        ("", "linux"),
    ],
)
def test_a_distribution_is_known_by_what_it_descends_from(
    text: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "os-release").write_text(text)
    monkeypatch.setattr(missing, "_OS_RELEASE", tmp_path / "os-release")
    missing.system.cache_clear()
    assert missing.system() == system
    missing.system.cache_clear()


def test_an_unknown_error_is_given_in_one_line() -> None:
    found = after_failing("NV", RuntimeError("the GPU has fallen\noff the bus"))
    assert str(found) == "the GPU has fallen"
