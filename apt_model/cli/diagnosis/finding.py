"""What the doctor found: one cause a finding, with its figure and a remedy; and what each code means."""

from typing import Literal, NamedTuple

Severity = Literal["broken", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("broken", "warning", "note")


class Finding(NamedTuple):
    """One cause. A remedy is a line for the shell; what follows a # in it is for the reader."""

    code: str
    severity: Severity
    cause: str
    figure: str = ""
    remedy: str = ""


class Meaning(NamedTuple):
    """What a code means, and what to do about it."""

    meaning: str
    advice: str


CODES: dict[str, Meaning] = {
    "APT-D01": Meaning(
        "Python, or the platform, is not one that this version supports.",
        "Make an environment with a Python of the range in the finding, and install there.",
    ),
    "APT-D02": Meaning(
        "A package that this version needs is not installed where this Python looks.",
        "The remedy installs it. If it is installed elsewhere, run apt-model with that environment's Python.",
    ),
    "APT-D03": Meaning(
        "A package is older than this version was written for.",
        "The remedy raises it. Packages of an extra are a warning: only what the extra is for is affected.",
    ),
    "APT-D04": Meaning(
        "A package says in its own metadata that it was made for another version of one that is installed.",
        "Such pairs (torch and torchvision above all) fail at import or at the first call. Install both at once, so "
        "that pip chooses versions that fit.",
    ),
    "APT-D05": Meaning(
        "The same package is installed twice: its files may be a mixture of both.",
        "An interrupted or a forced installation leaves this behind. Uninstall until pip says that there is none, "
        "then install once.",
    ),
    "APT-D06": Meaning(
        "A file or a folder stands in front of the package of the same name, so another one is imported.",
        "Rename it, leave its folder, or take it out of PYTHONPATH.",
    ),
    "APT-D07": Meaning(
        "Several packages own the folder triton/, and overwrite one another's files.",
        "Remove all of them, then install the one that belongs to your GPU.",
    ),
    "APT-D08": Meaning(
        "The machine has an NVIDIA GPU, and the torch that is installed was built without CUDA.",
        "Everything runs, on the CPU. The remedy installs the build that fits the driver.",
    ),
    "APT-D09": Meaning(
        "torch was built with a newer major version of CUDA than the NVIDIA driver runs.",
        "Update the driver, or install a torch that was built with the driver's CUDA or an older one.",
    ),
    "APT-D10": Meaning(
        "A shared library that a package needs is not found.",
        "The finding names the library and, where that is known, what brings it. A reinstallation brings libraries "
        "that come as packages; those of a driver or of a vendor's toolkit come with it.",
    ),
    "APT-D11": Meaning(
        "A device backend that torch loads by itself cannot be loaded, so that `import torch` fails altogether.",
        "torch's message names the backend and hides the cause; the finding has the cause. Without the vendor's "
        "software the backend is of no use: uninstall it, or keep torch from loading it.",
    ),
    "APT-D12": Meaning(
        "A package is installed, and importing it fails.",
        "The finding has the innermost error. A forced reinstallation repairs files that are missing or mixed.",
    ),
    "APT-D13": Meaning(
        "A process was killed by a signal, which no code in it can catch.",
        "An illegal instruction: the build is for a newer processor. SIGKILL: usually the system, out of memory. "
        "SIGBUS: a full /dev/shm, or a truncated file. Others: mixed or damaged libraries.",
    ),
    "APT-D14": Meaning(
        "A process waits for something that does not come.",
        "The finding says where. A hanging driver needs a restart of the machine; a hanging import is often a lock "
        "file or a network folder.",
    ),
    "APT-D15": Meaning(
        "torch and NumPy do not work together: one was built for another major version of the other.",
        "The remedy raises both.",
    ),
    "APT-D20": Meaning(
        "There is an NVIDIA GPU, and its driver is not loaded.",
        "Install the driver, or load it (sudo modprobe nvidia); after an update of the kernel it must be built again.",
    ),
    "APT-D21": Meaning(
        "The driver's kernel module and its libraries are of different versions.",
        "The driver was updated while the old module was in use. A restart loads the new one.",
    ),
    "APT-D22": Meaning(
        "The driver is there, and the GPU's device files are not.",
        "A container gets them when it is started (docker run --gpus all); on a machine without a display "
        "nvidia-modprobe makes them.",
    ),
    "APT-D23": Meaning(
        "The GPU's device files may not be opened by this user.",
        "The group that owns them is usually video or render. A new membership counts from the next login on.",
    ),
    "APT-D24": Meaning(
        "An environment variable hides all GPUs.",
        "An empty value, -1, or a number that is not there hides them; unset it, or list the GPUs that are meant.",
    ),
    "APT-D25": Meaning(
        "The GPU is there and the driver, or torch, finds none.",
        "The finding has the driver's own words.",
    ),
    "APT-D26": Meaning(
        "nvidia-smi, which comes with the driver, is not found.",
        "Nothing here needs it. Without it the driver's libraries may be missing too.",
    ),
    "APT-D27": Meaning(
        "This is Windows' Subsystem for Linux.",
        "Its GPU comes through /dev/dxg and Windows' driver; no Linux driver is installed in it. It pins only a part "
        "of its memory: how much is measured, not looked up.",
    ),
    "APT-D28": Meaning(
        "A small computation failed on the device, or its result was wrong.",
        "With 'no kernel image' torch was not built for this GPU. A wrong result without an error is a fault of the "
        "hardware or of the driver: do not train on it.",
    ),
    "APT-D30": Meaning(
        "A control group (a container, a job, a service) allows far less memory than the machine has.",
        "Programs that read the machine's memory are killed at this limit; apt-model keeps to it. Raise it where the "
        "container is started.",
    ),
    "APT-D31": Meaning(
        "Less memory can be locked, or pinned for a GPU, than the limits promise.",
        "It was locked piece by piece, in a process of its own, until the system refused. Weights that stream from "
        "host memory at full speed lie in pinned memory: give the host level no more than that.",
    ),
    "APT-D32": Meaning(
        "The shared memory of /dev/shm is small: data loaders with workers hand batches over through it.",
        "Workers die with SIGBUS when it is full. A container gets a larger one when it is started.",
    ),
    "APT-D40": Meaning(
        "A folder cannot be written.",
        "Choose another one (--folder here, TMPDIR for temporary files), or repair its rights. A disk that the system "
        "mounted read-only after an error must be checked first.",
    ),
    "APT-D41": Meaning(
        "A disk is full, or nearly so.",
        "Checkpoints and levels on disk need room for the whole of what they hold.",
    ),
    "APT-D42": Meaning(
        "A folder that is meant as a disk is none: it lies in memory, or across a network.",
        "What is written to a tmpfs takes host memory. Choose a folder on a local disk.",
    ),
    "APT-D50": Meaning(
        "Of the settings of a cloud service only a part is there.",
        "Values are never shown. Set the others, or unset all.",
    ),
    "APT-D51": Meaning(
        "The address of a cloud service does not begin with https://.",
        "Over plain HTTP the key can be read by everyone on the way.",
    ),
    "APT-D60": Meaning(
        "An environment variable begins with our prefix and is not read by this version.",
        "docs/environment.md lists those that are.",
    ),
    "APT-D61": Meaning(
        "APT_DEVICE names a device that is not there.",
        "Programs warn and take the best there is, which may be the CPU.",
    ),
    "APT-D90": Meaning(
        "A probe of the doctor could not be made.",
        "Nothing is known of what it would have shown.",
    ),
}
"""Of all findings."""
