"""A small training of each family; tests replace what they are about."""

from dataclasses import replace

from lowrank_tune.records import TrialConfig

DIRECT = TrialConfig(
    "r004-direct-0000", number=0, seed=7, family="direct", rank=4, lr=1e-3, weight_decay=1e-5, batch_size=4, epochs=5,
    patience=10, family_params={"lambda_b": 1e-4, "lambda_ortho": 1e-3},
)  # fmt: skip
SKETCH = replace(DIRECT, trial_id="r004-sketch-0000", family="sketch", family_params={})
REFINED = replace(DIRECT, trial_id="r004-refined-0000", family="refined", family_params={"steps": 3})
