"""Which images an epoch shows: all alike, rare classes more often, a share without objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfdetr.console import UserError, say
from rfdetr.data.records import CocoSplit
from rfdetr.text import printable

ROWS = 20  # of the table of classes: the rarest


@dataclass(frozen=True)
class Pool:
    """Images that an epoch draws from."""

    indices: Tensor  # (n,) int64
    factors: Tensor | None = None  # (n,) how often each is shown to once of another; None: alike

    def draw(self, wanted: int, generator: torch.Generator) -> Tensor:
        """`wanted` indices: one shuffle of the images, each as often as its factor says, after the
        other.

        A factor's fraction is the chance of once more, drawn for each shuffle. Raises ValueError
        where there is nothing to draw from.
        """
        if wanted and not len(self.indices):
            raise ValueError("a pool of no images to draw from")
        drawn = [self.indices[:0]]
        while sum(map(len, drawn)) < wanted:
            places = torch.arange(len(self.indices))
            if self.factors is not None:
                more = torch.rand(len(places), generator=generator) < self.factors.frac()
                places = places.repeat_interleave(self.factors.long() + more)
            order = torch.randperm(len(places), generator=generator)
            drawn.append(self.indices[places[order]])
        return torch.cat(drawn)[:wanted]


@dataclass(frozen=True)
class Mix:
    """What an epoch is made of.

    `every_other`: of the images, every second place goes to one of these, where there are any.
    `negatives`: `share` of the places goes to these, images without objects; None: no such rule.
    """

    images: Pool
    every_other: Pool | None = None
    negatives: Pool | None = None
    share: float = 0.0

    def draw(self, wanted: int, generator: torch.Generator) -> Tensor:
        """The indices of an epoch of `wanted` images, as the generator decides."""
        without = round(self.share * wanted) if self.negatives else 0
        order = self.images.draw(wanted - without, generator)
        if self.every_other:
            places = order[::2]
            places[:] = self.every_other.draw(len(places), generator)
        if not without:
            return order
        order = torch.cat([order, self.negatives.draw(without, generator)])
        return order[torch.randperm(wanted, generator=generator)]


def make_mix(
    split: CocoSplit,
    every_other: list[int],
    repeat_factor: float | None = None,
    negatives: float | None = None,
) -> Mix:
    """What --repeat_factor and --negatives ask for.  every_other: indices, as in Mix.

    Raises UserError where a share of images without objects is asked for and there is none, or
    nothing else.
    """
    factors = repeat_factors(split, repeat_factor) if repeat_factor else None

    def pool(indices: np.ndarray | list[int]) -> Pool:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return Pool(chosen, None if factors is None else factors[chosen])

    others = pool(every_other) if every_other else None
    if negatives is None:
        return Mix(pool(range(len(split.images))), others)
    is_empty = np.array(split.objects_per_image) == 0
    if negatives and not is_empty.any():
        raise UserError(
            f"--negatives {negatives:g}: every image of {split.annotation_file} shows an object. "
            "Add images without annotations to its images, or leave the flag out"
        )
    if is_empty.all():
        raise UserError(
            f"--negatives {negatives:g}: no image or tile of {split.annotation_file} shows an "
            "object. Leave the flag out, or give a larger --tile"
        )
    without = pool(np.flatnonzero(is_empty)) if negatives else None
    return Mix(pool(np.flatnonzero(~is_empty)), others, without, negatives)


def repeat_factors(split: CocoSplit, threshold: float) -> Tensor:
    """How often each image is shown, (images,) float64 >= 1: LVIS's, arXiv:1908.03195, B.2.

    A class's factor is sqrt(threshold / share of the images that show it), at least 1; an image's
    is the largest of its classes'.
    """
    places = split.places
    labels = split.images.labels
    _, shown = np.unique(np.stack([places, labels], axis=1), axis=0).T
    shown_in = np.bincount(shown, minlength=len(split.class_names))
    shares = np.maximum(shown_in, 1) / len(split.images)
    of_class = np.sqrt(threshold / shares).clip(1)
    factors = np.ones(len(split.images))
    np.maximum.at(factors, places, of_class[labels])
    return torch.from_numpy(factors)


def say_counts(split: CocoSplit, order: Tensor, mixes_images: bool = False) -> None:
    """Print what an epoch shows: images without objects, and the objects of each class.

    order: indices of the epoch's images; "before" is a mean epoch of as many images, all alike.
    mixes_images: the augmentation shows objects of other images, too.
    """
    times = torch.bincount(order, minlength=len(split.images)).numpy()
    per_image = np.array(split.objects_per_image)
    empty = times[per_image == 0].sum() / len(order)
    mixed = ", before --augment puts objects of other images on some" if mixes_images else ""
    say(f"Epoch 1 shows {len(order):,} images, {100 * empty:.0f} % of them without objects{mixed}")
    before = np.array(split.objects_per_class) * len(order) / len(split.images)
    now = np.zeros(len(before), int)
    np.add.at(now, split.images.labels, times[split.places])
    rarest = np.argsort(before, kind="stable")[:ROWS]
    say(f"{'objects of':<24}{'before':>9}{'now':>9}")
    for label in sorted(rarest.tolist()):
        name = printable(split.class_names[label])[:23]
        say(f"{name:<24}{before[label]:>9,.0f}{now[label]:>9,}")
    if len(before) > ROWS:
        say(f"... the {ROWS} rarest of {len(before):,} classes")
