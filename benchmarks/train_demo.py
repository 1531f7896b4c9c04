"""Train the two embedded detectors of `qdetr demo` from nothing, with the project's own `qdetr finetune`.

    python -m benchmarks.train_demo conditional_detr runs/demo      (about 80 minutes on two cores)
    python -m benchmarks.train_demo d_fine runs/demo                (about 50 minutes)

Four steps: write digit scenes; build a small model and warm its backbone up by classifying digit crops of
the training split (a cold backbone does not learn to detect in this time); `qdetr finetune` with the recipe
benchmarks/float_from_scratch.yaml; and, from its `last` checkpoint, with benchmarks/float_to_the_end.yaml,
so that nothing fine-tuned later gains by mere training. Then the `last` checkpoint, not the best on the
evaluation split, is embedded.
"""

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

from qdetr_cli.batchnorm import freeze_batch_norms, thaw_batch_norms
from qdetr_cli.families import family_of
from qdetr_cli.processors import Processor
from qdetr_cli.runs import write_json
from qdetr_cli.scene_files import write_scenes
from qdetr_cli.scenes import CLASS_NAMES, digit_crop

SIZE, CROP = 64, 32
TRAIN_IMAGES, CROPS, WARM_STEPS, WARM_BATCH = 24_000, 16_000, 1_000, 64
PIXELS = Processor(size=(SIZE, SIZE), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PRIOR = 0.01
EPOCHS = {"conditional_detr": 8, "d_fine": 6}


def conditional_detr() -> nn.Module:
    """A Conditional-DETR: two-stage ResNet at stride 8, width 128, 2 encoder and 3 decoder layers."""
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[48, 128], depths=[1, 2], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.ConditionalDetrConfig(
        backbone_config=backbone,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_queries=30,
        dropout=0.0,
        bbox_loss_coefficient=3,  # about half of the usual, since the loss gives classes half of their weight
        giou_loss_coefficient=1,
        **_names(),
    )
    model = transformers.ConditionalDetrForObjectDetection._from_config(config, attn_implementation="eager")
    _fresh_start(model)
    return model


def d_fine() -> nn.Module:
    """A D-FINE: HGNetV2 at strides 8 and 16, width 64, 2 decoder layers, no denoising queries."""
    backbone = transformers.HGNetV2Config(
        embedding_size=16,
        stem_channels=[3, 16, 24],
        stage_in_channels=[24, 48, 96, 128],
        stage_mid_channels=[16, 24, 32, 48],
        stage_out_channels=[48, 96, 128, 192],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=[48, 96, 128, 192],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[96, 128],
        feat_strides=[8, 16],
        num_feature_levels=2,
        decoder_in_channels=[64, 64],
        encoder_hidden_dim=64,
        d_model=64,
        encode_proj_layers=[1],
        encoder_layers=1,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=30,
        num_denoising=0,
        decoder_n_points=[4, 4],
        head_dim=16,
        depth_mult=0.34,
        hidden_expansion=0.5,
        max_num_bins=16,
        lqe_hidden_dim=32,
        **_names(),
    )
    return transformers.DFineForObjectDetection._from_config(config, attn_implementation="eager")


MODELS = {"conditional_detr": conditional_detr, "d_fine": d_fine}


def main() -> None:
    """Write scenes, build and warm up, and hand over to `qdetr finetune`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scenes, start = arguments.out / "scenes", arguments.out / f"{arguments.model}-start"
    if not scenes.exists():
        write_scenes(scenes, train=TRAIN_IMAGES, val=500, size=SIZE, seed=0)
    if not start.exists():
        write_start(arguments.model, start, arguments.seed)
    settings, first = (f"train.seed={arguments.seed}",), arguments.out / f"{arguments.model}-first"
    epochs = f"train.epochs={EPOCHS[arguments.model]}"
    train(start, "float_from_scratch.yaml", scenes, first, (epochs, *settings))
    train(first / "last", "float_to_the_end.yaml", scenes, arguments.out / arguments.model, settings)


def train(source: Path, recipe: str, scenes: Path, out: Path, settings: tuple[str, ...]) -> None:
    """One `qdetr finetune`, which goes on where it was interrupted, and does nothing if it is finished."""
    command = [sys.executable, "-m", "qdetr_cli", "finetune", str(source)]
    command += ["--recipe", str(Path(__file__).with_name(recipe)), "--data", str(scenes / "voc")]
    command += ["--out", str(out)] + [word for setting in settings for word in ("--set", setting)]
    print(" ".join(command), flush=True)
    subprocess.run(command + (["--resume"] if (out / "run.json").exists() else []), check=True)


def write_start(name: str, folder: Path, seed: int) -> None:
    """A Hugging Face folder with an untrained detector on a backbone that knows digits."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    family = family_of(model)
    thaw_batch_norms(model, family)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    print(f"warm-up: accuracy on held-out crops {warm_up(model, seed):.3f}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    freeze_batch_norms(model, family).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PIXELS.to_config())


def warm_up(model: nn.Module, seed: int) -> float:
    """Train the backbone to classify digit crops; the accuracy on crops held out."""
    backbone = model.model.backbone.model.requires_grad_(
        True
    )  # transformers freezes some or all of it by name
    pixels, labels = _crops(seed)
    held = 500
    classifier = nn.Linear(backbone(pixels[:2]).feature_maps[-1].shape[1], len(CLASS_NAMES))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=WARM_STEPS, pct_start=0.05
    )
    backbone.train()
    for _ in range(WARM_STEPS):
        chosen = torch.randint(held, len(pixels), (WARM_BATCH,))
        scores = classifier(backbone(pixels[chosen]).feature_maps[-1].mean((2, 3)))
        loss = nn.functional.cross_entropy(scores, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    backbone.eval()
    with torch.no_grad():
        scores = classifier(backbone(pixels[:held]).feature_maps[-1].mean((2, 3)))
    return float((scores.argmax(1) == labels[:held]).float().mean())


def _crops(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised crops (n, 3, CROP, CROP) and their digits (n,)."""
    pairs = [digit_crop(index, size=CROP, seed=seed) for index in range(CROPS)]
    images = torch.stack([torch.from_numpy(image) for image, _ in pairs]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    return (images - mean) / std, torch.tensor([digit for _, digit in pairs])


@torch.no_grad()
def _fresh_start(model: nn.Module) -> None:
    """What short trainings need: Xavier matrices, queries all over the image, priors of boxes and classes."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "backbone" not in name and "embeddings" not in name:
            nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.model.query_position_embeddings.weight)
    nn.init.constant_(model.class_labels_classifier.bias, -math.log((1 - PRIOR) / PRIOR))
    nn.init.zeros_(model.bbox_predictor.layers[-1].weight)
    nn.init.zeros_(model.bbox_predictor.layers[-1].bias)
    head = model.model.decoder.ref_point_head
    points = head(model.model.query_position_embeddings.weight)
    scale = 1.3 / points.std(0)
    head.layers[-1].weight.mul_(scale[:, None])
    head.layers[-1].bias.copy_(-points.mean(0) * scale)


def _names() -> dict[str, dict[int, str] | dict[str, int]]:
    names = dict(enumerate(CLASS_NAMES))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


if __name__ == "__main__":
    main()
