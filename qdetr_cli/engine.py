"""What a training runs on: accelerate's precision and device, and DDP where several processes share it."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qdetr_cli.errors import RunError
from qdetr_cli.processes import world
from qdetr_cli.recipe import Train


def accelerator(train: Train, device: str) -> Accelerator:
    """Accelerate's engine. Its state is one per process, so that of an earlier training is dropped."""
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}[train.precision]
    if train.precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise RunError("train.precision: fp16 needs CUDA; use bf16 or float32 on a CPU")
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        # given, so that what a launcher's configuration says of it does not divide the loss again
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def shared_out(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, under DDP where several processes train it.

    Not by `Accelerator.prepare`, which would leave evaluations under autocast. What a stage has off, and what
    only some images need (denoising queries), gets no gradient in a step. Live batch norms get the
    statistics of the first process.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
    )


def training_mode(model: nn.Module, train: Train) -> None:
    """Training mode; with `batch_norm: frozen`, batch norms keep their statistics."""
    model.train()
    if train.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
