"""A training script of this repository on the clock; peer_ours.py runs it.

python benchmarks/clocked_script.py OUT SPENT SCRIPT FLAGS ...

After each epoch the averaged weights are scored, not counted, and handed in to OUT; no pictures are
drawn. OUT/clock.json holds {"seconds": on the clock at the end, SPENT included, "epochs": those of
each epoch's training, "steps": of an epoch, "parameters"}.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training_clock import TrainingClock

from rfdetr import main as way_of_a_run

CLOCK = "clock.json"


def put_on_clock(clock: TrainingClock, facts: dict) -> None:
    """Have the training scripts hand in after each epoch, and count into `facts`."""
    train_one_epoch = way_of_a_run.train_one_epoch

    def timed_epoch(trainer, loader, after_step) -> dict:
        begin = clock.seconds
        means = train_one_epoch(trainer, loader, after_step)
        facts["epochs"].append(clock.seconds - begin)
        facts["steps"] = trainer.progress.steps
        return means

    def evaluate(trainer, evaluator, record) -> dict[str, dict]:
        with clock.paused():
            results = evaluator.collect(trainer.ema.module)
            masks = results.results("segm") if results.masks else None
            clock.hand_in(results.results("bbox"), masks)
            record["valid_ema"] = results.summary()
            modules = [trainer.model] + ([evaluator.frozen] if evaluator.frozen else [])
            parameters = [p.numel() for module in modules for p in module.parameters()]
            facts["parameters"] = sum(parameters)
        return {"ema": record["valid_ema"]}

    way_of_a_run.train_one_epoch = timed_epoch
    way_of_a_run.evaluate = evaluate
    way_of_a_run.draw_pictures = lambda *args: None


def main() -> None:
    out, spent, script, *flags = sys.argv[1:]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    clock = TrainingClock(out, minutes=1, spent=float(spent))
    facts = {"epochs": []}
    put_on_clock(clock, facts)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        facts["seconds"] = clock.seconds
        (out / CLOCK).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
