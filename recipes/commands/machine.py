"""What a machine has for the kernels, what is missing, and the exact line that mends it."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
NVIDIA = "0x10de"  # the vendor's number on the PCI bus
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"


class Machine(NamedTuple):
    """Facts that the advice follows from."""

    system: str = "Linux"
    torch_cuda: str | None = None  # the CUDA version that torch was built for; None: a CPU build
    usable: bool = False  # torch can run on a GPU
    capability: tuple[int, int] | None = None
    card: bool = False  # an NVIDIA GPU is in the machine
    driver: str | None = None  # version of NVIDIA's driver
    hidden: str | None = None  # the value of CUDA_VISIBLE_DEVICES
    triton: str | None = None
    clash: str | None = None  # where the package index's `kernels` lies, if it is installed


def inspect() -> Machine:
    """The machine that this runs on."""
    import torch

    usable = torch.cuda.is_available()
    driver = driver_version(Path("/proc/driver/nvidia/version"))
    return Machine(
        system=platform.system(),
        torch_cuda=torch.version.cuda,
        usable=usable,
        capability=torch.cuda.get_device_capability() if usable else None,
        card=usable or driver is not None or has_card(Path("/sys/bus/pci/devices")),
        driver=driver,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        triton=triton_version(),
        clash=find_clash(),
    )


def driver_version(file: Path) -> str | None:
    """The driver's version from its file in /proc."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)", file.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def has_card(devices: Path) -> bool:
    """Whether a display or 3D controller of NVIDIA's is among the devices of a PCI bus."""
    for device in devices.glob("*") if devices.is_dir() else ():
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith("0x03"):
            return True
    return False


def find_clash() -> str | None:
    """Where the Hugging Face package `kernels` lies, None if it is not installed. Ours belongs to the distribution lightning-mixers."""
    try:
        found = distribution("kernels")
    except PackageNotFoundError:
        return None
    return str(Path(str(found.locate_file("kernels"))))


def ours_is_imported() -> bool:
    """Whether `import kernels` finds our package. It may not: the first of that name on the path wins."""
    spec = find_spec("kernels")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any((Path(folder) / "delta" / "api.py").is_file() for folder in folders)


def installed(*names: str) -> str | None:
    """The version of the first of some distributions that is installed."""
    for name in names:
        try:
            return distribution(name).version
        except PackageNotFoundError:
            continue
    return None


def triton_version() -> str | None:
    """The version of Triton, by either name that it is distributed under."""
    return installed("triton", "pytorch-triton")


def advice(machine: Machine) -> list[str]:
    """What is missing and the line that mends it; nothing on a machine that has all it can use."""
    found = [_gpu(machine), _triton(machine)]
    if machine.clash:
        found.append(
            f"The package index's `kernels` (Hugging Face) is installed too, in {machine.clash}; it and ours share a name, and whichever comes "
            "first on the path is imported: pip uninstall kernels"
        )
    return [line for line in found if line]


def _gpu(machine: Machine) -> str | None:
    if machine.usable:
        if machine.capability is not None and machine.capability < OLDEST_CAPABILITY:
            major, minor = machine.capability
            return f"The GPU has compute capability {major}.{minor}; the kernels are made for 8.0 and newer, use an Ampere GPU or the CPU"
        return None
    if not machine.card:
        return None
    if machine.torch_cuda is None:
        return f"This machine has an NVIDIA GPU, but torch is a CPU build: pip install --force-reinstall torch --index-url {TORCH_INDEX}"
    if machine.driver is None:
        return "This machine has an NVIDIA GPU, but no driver for it is loaded: sudo apt install nvidia-driver-580-server && sudo reboot"
    if machine.hidden is not None and machine.hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={machine.hidden!r} hides the GPU: unset CUDA_VISIBLE_DEVICES"
    return (
        f"torch is built for CUDA {machine.torch_cuda} and cannot use driver {machine.driver}: install a newer driver, or a torch for an older CUDA, "
        "such as pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
    )


def _triton(machine: Machine) -> str | None:
    if machine.system != "Linux":
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    if machine.triton is None:
        return f"Triton is not installed: {sys.executable} -m pip install 'triton>={oldest}'"
    if tuple(int(n) for n in re.findall(r"\d+", machine.triton)[:2]) < OLDEST_TRITON:
        return f"Triton {machine.triton} is too old: {sys.executable} -m pip install --upgrade 'triton>={oldest}'"
    return None
