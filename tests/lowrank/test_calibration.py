import torch

from lowrank_tune.lowrank.calibration import Noise, measure_training
from lowrank_tune.lowrank.data import Resident
from lowrank_tune.lowrank.decomposers import make_decomposer
from lowrank_tune.records import Split, TrialConfig


def test_noise_may_be_held_whole_by_a_device_as_a_studys_features_are():
    noise = Noise(4, 6, 20, "float16")
    assert len(noise) == 20
    assert torch.equal(Resident(noise, "cpu").load([19, 0, 8]), noise.load([19, 0, 8], torch.float16).float())


def test_memory_counts_what_a_training_keeps_of_all_its_images_though_few_are_measured():
    config = TrialConfig("t", 0, 0, "refined", 3, 1e-3, 1e-5, 4, 2, 2, {"steps": 2}, objective="val_mse")
    noise = Noise(16, 24, 1000)
    few, many = (
        measure_training(config, noise, Split(tuple(range(train)), (0, 1), ()), "cpu")[1] for train in (12, 900)
    )
    one = make_decomposer(config, 16, 24).precompute(noise.load([0]))
    assert many - few == (900 - 12) * sum(part.nbytes for part in one)
