"""What predictions.json says of the objects in an image or a video's frame."""

from __future__ import annotations

from pathlib import Path

from rfdetr.inference.prediction import Prediction


def as_records(
    path: Path,
    picture: str | None,
    prediction: Prediction,
    frame: int | None = None,
    page: int | None = None,
) -> list[dict]:
    """predictions.json's entries: bbox xywh in pixels of the original, mask as COCO RLE or null.

    frame: of a video, from 0 on; page: of a file with several, from 1 on.  picture: the
    picture's or video's name in --output, or None.
    """
    records = []
    names = prediction.names
    for i, (x0, y0, x1, y1) in enumerate(prediction.boxes.tolist()):
        record = {
            "file": str(path),
            "picture": picture,
            "class": names[i],
            "score": prediction.scores[i].item(),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "mask": prediction.rles[i] if prediction.rles else None,
        }
        if prediction.mask_scores is not None:
            record["mask_score"] = prediction.mask_scores[i].item()
        if frame is not None:
            record["frame"] = frame
        if page is not None:
            record["page"] = page
        if prediction.tracks is not None:
            record["track"] = prediction.tracks[i].item()
        records.append(record)
    return records
