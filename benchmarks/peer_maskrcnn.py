"""torchvision's Mask R-CNN with a ResNet-18 from scratch on the clock.

python benchmarks/peer_maskrcnn.py --dataset D --out DIR --minutes 10

Model and heads are torchvision's; batch normalisation is trained, as nothing is pretrained. Recipe:
its references/detection, horizontal flips, a tenth of the rate after 16/26 and 22/26 of the time,
with --opt adamw: its SGD at .02 for 16 images, scaled to 4, went to NaN at the ninth step after a
short warm-up, and its warm-up of 1000 steps takes longer than there is. Made for small images:
min_size is the side that the others see, the smallest anchor follows from the dataset's objects,
and 128 regions an image train the heads, not 512, which would take much longer. The last weights
are handed in, up to 100 detections an image.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from training_clock import ANNOTATIONS, TrainingClock, coco_results, peer_arguments, write_facts

BATCH = 4
RATE = 3e-4
WARMUP_SHARE = 0.05
DROPS = (16 / 26, 22 / 26)
REGIONS = 128


class Split:
    """A split's images and targets as torchvision's detectors take them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.coco = COCO(str(folder / ANNOTATIONS))
        self.ids = sorted(self.coco.getImgIds())
        self.categories = sorted(self.coco.getCatIds())

    def image(self, image_id: int) -> Tensor:
        """(3, H, W), 0..1."""
        name = self.coco.imgs[image_id]["file_name"]
        pixels = np.asarray(Image.open(self.folder / name).convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def target(self, image_id: int) -> dict[str, Tensor]:
        annotations = []
        for annotation in self.coco.imgToAnns[image_id]:
            width, height = annotation["bbox"][2:]
            if not annotation.get("iscrowd") and width > 0 and height > 0:
                annotations.append(annotation)
        info = self.coco.imgs[image_id]
        masks = np.zeros((len(annotations), info["height"], info["width"]), np.uint8)
        for mask, annotation in zip(masks, annotations):
            mask[:] = self.coco.annToMask(annotation)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.categories.index(a["category_id"]) + 1 for a in annotations]
        labels = torch.tensor(labels, dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}

    def smallest_anchor(self, side: int) -> int:
        """A power of two near the smaller objects' side, in pixels of the model's input."""
        sides = []
        for annotation in self.coco.anns.values():
            info = self.coco.imgs[annotation["image_id"]]
            shrunk = side / min(info["width"], info["height"])
            sides.append(math.sqrt(annotation["bbox"][2] * annotation["bbox"][3]) * shrunk)
        return max(2 ** round(math.log2(np.quantile(sides, 0.1))), 2)


def build(classes: int, side: int, anchor: int) -> MaskRCNN:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    sizes = tuple((anchor * 2**level,) for level in range(5))
    return MaskRCNN(
        backbone,
        num_classes=classes + 1,
        min_size=side,
        max_size=4 * side,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        box_batch_size_per_image=REGIONS,
    )


def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


def factor(clock: TrainingClock) -> float:
    """Of the learning rate: the warm-up, then two drops, placed by the clock."""
    warm = min(clock.share / WARMUP_SHARE, 1.0)
    return warm * 0.1 ** sum(clock.share >= drop for drop in DROPS)


@torch.inference_mode()
def hand_in(clock: TrainingClock, model: MaskRCNN, split: Split) -> None:
    model.eval()
    boxes = []
    masks = []
    for image_id in split.ids:
        (found,) = model([split.image(image_id)])
        of_boxes, of_masks = coco_results(
            image_id,
            found["boxes"].numpy(),
            found["scores"].numpy(),
            [split.categories[label - 1] for label in found["labels"].tolist()],
            (found["masks"][:, 0] > 0.5).numpy(),
        )
        boxes += of_boxes
        masks += of_masks
    clock.hand_in(boxes, masks)
    model.train()


def main() -> None:
    args = peer_arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    clock = TrainingClock(args.out, args.minutes)
    train = Split(args.dataset / "train")
    valid = Split(args.dataset / "valid")
    anchor = train.smallest_anchor(args.side)
    model = build(len(train.categories), args.side, anchor).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
    step = 0
    order: list[int] = []
    while not clock.over:
        if len(order) < BATCH:
            order += [train.ids[i] for i in torch.randperm(len(train.ids)).tolist()]
        batch = [(train.image(i), train.target(i)) for i in order[:BATCH]]
        batch = [flipped(*pair) if torch.rand(()) < 0.5 else pair for pair in batch]
        order = order[BATCH:]
        losses = model(*map(list, zip(*batch)))
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        step += 1
        optimizer.param_groups[0]["lr"] = RATE * factor(clock)
        optimizer.step()
        if step % 20 == 0:
            print(f"{clock.seconds:.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
        if clock.due() or clock.over:
            with clock.paused():
                hand_in(clock, model, valid)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    taken = f"{step} steps of {BATCH} images, anchors {anchor} to {anchor * 16} px"
    write_facts(args.out, parameters, step * BATCH, taken)


if __name__ == "__main__":
    main()
