"""What asking the language model takes beyond loading it: images a second and memory, of the tiny checkpoint.

    .venv/bin/python scripts/bench_fidelity.py [--images 16] [--forms 20] [--image-size 448]

A minute or two on 2 cores. A small study is run once, for its features and trials; then, in this process and without
Ray, a worker is made as the pool makes it, and asked about all images in so many forms, spread over all that the study
has. Each worker holds the weights and the forms of one image at a time: `peak` is how much the process grew while it
asked, and what it computed is what other work on the machine changes least. Wanted: 16 images in 20 forms in at most
60 s on 2 cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}

import torch

from lowrank_tune.config.schema import StudySpec
from lowrank_tune.features.asked import image_questions
from lowrank_tune.features.extract import plan_encoding
from lowrank_tune.features.shards import Pool
from lowrank_tune.fidelity import measure
from lowrank_tune.fidelity.job import Asker, Asking, Item
from lowrank_tune.fidelity.ways import wanted_forms
from lowrank_tune.lowrank.data import evenly
from lowrank_tune.past_study import open_study
from lowrank_tune.study import run_study

CORES = 2


def main() -> None:
    """Run the study, then time the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--forms", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=448)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    spec = StudySpec.model_validate(
        {
            "name": "asked",
            "features": {
                "source": {"samples": 3 * options.images},
                "encoder": {"checkpoint": "tiny-random", "image_size": options.image_size},
            },
            "split": {"validation": 4, "test": options.images, "group_by": None},
            "search": {"method": "grid", "space": {"rank": [16, 64], "families": {"sketch": {}, "shared": {}}}},
            "training": {"epochs": 2, "patience": 2},
            "scheduler": {"kind": "none"},
            "report": {"confirm_seeds": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_study(spec, results=Path(folder))
        study = open_study(folder, result.study_id)
        asked = measure.FidelitySpec(questions="What is in the picture?", images=options.images)
        forms = wanted_forms(result.comparison, asked, study.features)
        wanted = tuple(forms[place] for place in evenly(len(forms), options.forms))
        encoding = plan_encoding(spec.features, study.plan.features_root)
        plan = replace(study.plan, study_dir=Path(folder) / "asked")
        (plan.study_dir / "fidelity").mkdir(parents=True)
        asking = Asking(plan, asked, study.features, study.split, study.outcomes, wanted, encoding)
        questions = image_questions(study.features, asked).by_image
        items = [Item(image, questions[study.features.rows[image].key]) for image in study.split.test]
        started = time.perf_counter()
        asker = Asker(asking, Pool(1, 1, cpus=CORES, threads=CORES))
        if asker.problem:
            raise asker.problem
        cpu, loaded = time.process_time(), time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for item in items:
            for problem in asker.ask(item):
                print(problem)
        seconds, computed = time.perf_counter() - loaded, time.process_time() - cpu
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tokens, dim = study.features.tokens, study.features.dim
    counted = f"{len(items)} images x {len(wanted)} of {len(forms)} forms"
    print(f"[{tokens}, {dim}], {counted}, {torch.get_num_threads()} threads")
    print(f"loading {loaded - started:.1f} s, asking {seconds:.1f} s, of which {computed:.1f} s on a core")
    print(f"peak: {grown:.0f} MiB above loaded")


if __name__ == "__main__":
    main()
