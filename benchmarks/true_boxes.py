"""What a mask head could do on a perfect detector: its masks in true boxes, as COCO scores them.

python benchmarks/true_boxes.py --checkpoint RUN/best.pt --dataset dataset_thin [--split valid]

Every true object gets the query that the detector matches it to in training, however poor, and its
own true box in place of the predicted one: what is left are the errors of the mask head. All class
scores are 1; the masks' own scores rank them. Beside it stand the figures of evaluate.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


@torch.inference_mode()
def on_true_boxes(model, table, dataset, precision):
    """The CocoEvaluator with the masks that the model's head draws in the true boxes."""
    from rfdetr.data.augment import to_model_input
    from rfdetr.data.loaders import collate
    from rfdetr.inference.detections import Detections, draw_masks
    from rfdetr.losses.matcher import match
    from rfdetr.metrics.coco_eval import CocoEvaluator
    from rfdetr.placement import Placement

    split = dataset.split
    rows = torch.tensor(table.rows)
    evaluator = CocoEvaluator(split.ground_truth, masks=True)
    for index, record in enumerate(split.images):
        batch = collate([dataset[index, None]])
        target = batch.targets[0]
        outputs = model(to_model_input(batch.images, precision.device))
        count = len(target["labels"])
        predictions = {key: outputs[key].cpu() for key in ("pred_logits", "pred_boxes")}
        matches = match([predictions], rows[target["labels"]], target["boxes"], [count], groups=1)
        _, query, obj = matches[0]
        detections = Detections(
            indices=[index],
            placements=[Placement.resized(record.height, record.width)],
            scores=torch.ones(1, len(obj)),
            labels=target["labels"][obj][None],
            boxes=target["boxes"][obj][None],
            queries=outputs["queries"][:, query].float().cpu(),
            features=outputs["features"].float(),
            images=batch.images,
        )
        everyone = [np.arange(len(obj))]
        ((rles, mask_scores),) = draw_masks(model.head, detections, everyone, precision)
        boxes = detections.boxes_in_original(0)
        labels = np.asarray(split.category_ids)[detections.labels[0].numpy()]
        evaluator.add(record.id, boxes, np.ones(len(obj)), labels, rles, mask_scores)
    return evaluator


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rfdetr.data.coco import read_dataset
    from rfdetr.data.dataset import SplitDataset
    from rfdetr.data.loaders import evaluation_loader
    from rfdetr.device import pick_precision
    from rfdetr.inference.evaluation import SplitEvaluator
    from rfdetr.metrics.table import format_table
    from rfdetr.weights import checkpoint

    content = checkpoint.load(args.checkpoint)
    model, table = checkpoint.build_model(content, groups=None)
    precision = pick_precision("off", torch.device(args.device))
    model.to(precision.device)
    split = read_dataset(args.dataset)[args.split]
    table = table.in_order_of(split.class_names, split.category_ids, str(args.dataset))
    dataset = SplitDataset(split, content["resolution"], None, masks=True)
    print("true boxes")
    print(format_table(on_true_boxes(model, table, dataset, precision).summary()))
    loader = evaluation_loader(dataset, 8, 0, 0, 1)
    evaluator = SplitEvaluator(loader, table, precision, masks=True)
    print("predicted boxes")
    print(format_table(evaluator.evaluate(model)))


if __name__ == "__main__":
    main()
