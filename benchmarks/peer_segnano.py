"""PyPI's own SegNano from scratch on the clock; peers_at_equal_time.py runs it.

ENV/bin/python benchmarks/peer_segnano.py --dataset D --out DIR --minutes 10

Runs in an environment with rfdetr[train]==1.11.*, in the package's own training loop (PyTorch
Lightning) with its own recipe: batch 4, AdamW at 1e-4, multi-scale and crops, averaged weights,
which are handed in; its schedule is constant, so that it need not know its end. Nothing is
pretrained: the step that loads weights is left out, DINOv2's included. The side is the nearest
multiple of its patch of 12 that is not below the one the others see. No loader processes, no
validation, files or logs of its own, whose time would count.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
from pytorch_lightning import Callback
from training_clock import ANNOTATIONS, TrainingClock, coco_results, peer_arguments, write_facts

from rfdetr import config
from rfdetr.training import RFDETRDataModule, RFDETRModelModule, build_trainer
from rfdetr.training.callbacks import RFDETREMACallback

PATCH = 12
NO_DOWNLOAD = "none.pth"  # a name keeps the builder from fetching DINOv2; nothing reads the file


class TimeIsOver(Exception):
    """Ends the package's loop."""


class OnClock(Callback):
    """What the package's loop calls after each batch."""

    def __init__(self, clock: TrainingClock, data: RFDETRDataModule):
        self.clock = clock
        self.data = data
        self.images = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_number) -> None:
        self.images += len(batch[1])
        if batch_number % 10 == 0:
            print(f"{self.clock.seconds:.0f} s, {self.images} images", flush=True)
        if self.clock.due() or self.clock.over:
            with self.clock.paused():
                self.hand_in(module, averaged(trainer, module))
        if self.clock.over:
            raise TimeIsOver

    @torch.inference_mode()
    def hand_in(self, module: RFDETRModelModule, model: torch.nn.Module) -> None:
        boxes = []
        masks = []
        categories = self.categories()
        for images, targets in self.data.val_dataloader():
            sizes = torch.stack([target["orig_size"] for target in targets])
            for found, target in zip(module.postprocess(model(images), sizes), targets):
                known = found["labels"] < len(categories)  # the last row is background
                of_boxes, of_masks = coco_results(
                    int(target["image_id"]),
                    found["boxes"][known].numpy(),
                    found["scores"][known].numpy(),
                    [categories[row] for row in found["labels"][known].tolist()],
                    found["masks"][known, 0].numpy(),
                )
                boxes += of_boxes
                masks += of_masks
        self.clock.hand_in(boxes, masks)

    def categories(self) -> list[int]:
        """The dataset's category id of each row of the class head."""
        rows = self.data.val_dataloader().dataset.coco.label2cat
        return [rows[row] for row in range(len(rows))]


def averaged(trainer, module: RFDETRModelModule) -> torch.nn.Module:
    """A copy of the model with the averaged weights, ready to predict."""
    model = copy.deepcopy(module.model)
    for callback in trainer.callbacks:
        if isinstance(callback, RFDETREMACallback):
            model.load_state_dict(callback.get_ema_model_state_dict(), strict=False)
    return model.eval()


def count_classes(dataset: Path) -> int:
    content = json.loads((dataset / "train" / ANNOTATIONS).read_text(encoding="utf-8"))
    return len(content["categories"])


def main() -> None:
    args = peer_arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    clock = TrainingClock(args.out, args.minutes)
    side = -(-args.side // PATCH) * PATCH
    with tempfile.TemporaryDirectory() as folder:
        settings = config.SegmentationTrainConfig(
            dataset_dir=str(args.dataset),
            output_dir=folder,
            epochs=100_000,
            seed=args.seed,
            num_workers=0,
            tensorboard=False,
        )
        model_config = config.RFDETRSegNanoConfig(
            pretrain_weights=NO_DOWNLOAD,
            device="cpu",
            num_classes=count_classes(args.dataset),
            resolution=side,
            positional_encoding_size=side // PATCH,
        )
        with mock.patch("rfdetr.training.module_model.load_pretrain_weights"):
            module = RFDETRModelModule(model_config, settings)
        data = RFDETRDataModule(model_config, settings)
        trainer = build_trainer(settings, model_config, accelerator="cpu", limit_val_batches=0)
        on_clock = OnClock(clock, data)
        trainer.callbacks.append(on_clock)
        with contextlib.suppress(TimeIsOver):
            trainer.fit(module, data)
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    taken = f"{trainer.global_step} steps of {settings.batch_size} images at {side} px"
    write_facts(args.out, parameters, on_clock.images, taken)


if __name__ == "__main__":
    main()
