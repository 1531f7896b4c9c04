"""Where it runs: the device that a flag names, and with several processes a GPU for each."""

import torch

from qdetr_cli.errors import RunError
from qdetr_cli.launch import forced_to_cpu, launched_processes, local_rank

DEVICES = ("cpu", "cuda", "mps")


def torch_device(name: str) -> torch.device:
    """The device of a flag; `auto` is CUDA where there is one. Raises RunError for what is not there.

    A numbered CUDA device becomes the current one, which is where accelerate trains. Of several processes
    each has the GPU of its own number on its machine.
    """
    if launched_processes() > 1:
        return _own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unavailable = RunError(f"--device {name}: is not available here; choose auto, cpu, cuda, cuda:N or mps")
    if name.partition(":")[0] not in DEVICES:
        raise unavailable
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise unavailable from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _own_device(name: str) -> torch.device:
    """The device of this process among several."""
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(
            f"--device {name}: with several processes each has a GPU of its own; choose auto, cpu or cuda"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and (gpus == 0 or forced_to_cpu())):
        return torch.device("cpu")
    if local_rank() >= gpus:
        raise RunError(
            f"--device {name}: process {local_rank()} of this machine has no GPU: there are {gpus}; launch "
            "as many processes as there are GPUs, or choose --device cpu"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device
