"""The files of a Hugging Face folder or hub id, but for the weights: what `config.json` and its kin say."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from qdetr_cli.errors import CheckpointError
from qdetr_cli.manifest import MANIFEST
from qdetr_cli.reading import read_json

PROCESSOR_FILE = "preprocessor_config.json"


def read_local(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json, preprocessor_config.json or None) of a folder."""
    config = read_json_file(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder}: holds neither {MANIFEST} (qdetr) nor config.json (Hugging Face)")
    processor = read_json_file(folder / PROCESSOR_FILE)
    if processor is None and (whole := read_json_file(folder / "processor_config.json")):
        processor = whole.get("image_processor")
    return config, processor


def read_hub(source: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    try:
        with quiet():
            config, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: is no folder here, and the Hugging Face hub does not give it ({first_line(error)}); "
            "download it where there is a network and name the folder"
        ) from error
    try:
        with quiet():
            processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):  # optional on the hub as it is in a folder; _detector adds a note
        return config, None
    return config, processor


def snapshot(source: str) -> Path:
    """The folder of a hub id that has been downloaded."""
    return Path(str(cached_file(source, "config.json"))).parent


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and warnings of the libraries are left out; what matters is raised or noted by us."""
    log, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    before = log.get_verbosity(), hub.level, log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before[0])
        hub.setLevel(before[1])
        if before[2]:
            log.enable_progress_bar()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json_file(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no such file. CheckpointError for anything else."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content
