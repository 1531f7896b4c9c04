"""How this process was launched: alone, or by torchrun or accelerate as one of several. Without torch."""

import os

from qdetr_cli.errors import RunError

_OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def launched_processes() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process on its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return launched_processes() == 1 or launched_rank() == 0


def forced_to_cpu() -> bool:
    """Whether the launcher was told to stay on the CPU (`accelerate launch --cpu`)."""
    return _is_set("ACCELERATE_USE_CPU")


def check_launch() -> None:
    """Raise RunError for a launch that splits weights: quantizers need whole ones, and these models fit."""
    for variable, name in _OTHER_WAYS.items():
        if _is_set(variable):
            raise RunError(
                f"{name}: is not supported: the step of a quantizer follows from whole weights, and a DETR "
                "fits on one GPU; launch with torchrun or `accelerate launch --multi_gpu`, where each "
                "process holds the model (DDP)"
            )


def check_alone(command: str) -> None:
    """Raise RunError if `command`, which does not share its work out, was launched several times."""
    if launched_processes() > 1:
        raise RunError(
            f"{command}: runs in one process, and {launched_processes()} were launched; start it without "
            "launcher (finetune, quantize and eval run in several)"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
