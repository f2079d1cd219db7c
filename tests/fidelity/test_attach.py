"""A decomposer within the tiny model, through the processor, `forward` and `generate` of transformers."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import lowrank_tune
from lowrank_tune.errors import InputError
from lowrank_tune.features.tiny import quiet_transformers
from lowrank_tune.lowrank.decomposers import make_decomposer
from lowrank_tune.records import TrialConfig


def untrained(tokens, dim, rank=6):
    config = TrialConfig("r006-refined-0000", 0, 1, "refined", rank, 1e-3, 1e-5, 8, 3, 3, {"steps": 2}, (2, rank))
    return make_decomposer(config, tokens, dim).eval()


@pytest.fixture(scope="module")
def decomposer(x_NTD):
    return untrained(*x_NTD.shape[1:])


@pytest.fixture(scope="module")
def loaded(model_root):
    """What a user has: a model of transformers, and its processor."""
    (directory,) = (model_root / "checkpoints").iterdir()
    with quiet_transformers():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    model.generation_config.update(do_sample=False, temperature=None)
    return model, AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def inputs(loaded, squares_NHWC):
    """Two images in one conversation."""
    pictures = [{"type": "image", "image": Image.fromarray(square_HWC)} for square_HWC in squares_NHWC[:2]]
    return loaded[1].apply_chat_template(
        [{"role": "user", "content": [*pictures, {"type": "text", "text": "what are these?"}]}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_resize": False},
    )


@torch.no_grad()
def said(model, inputs):
    return model(**inputs).logits[0, -1], model.generate(**inputs, max_new_tokens=6)[0].tolist()


def test_within_the_block_the_model_sees_the_factors_of_every_image_and_afterwards_the_images(
    loaded, inputs, decomposer, x_NTD
):
    model = loaded[0]
    before = said(model, inputs)
    for rank in (2, None):
        with lowrank_tune.attach(model, decomposer, rank=rank):
            seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            plain = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=False)
            within = said(model, inputs)
        with torch.no_grad():
            a_NTR, b_NRD = decomposer(x_NTD[:2], rank)
        torch.testing.assert_close(torch.stack(seen), a_NTR @ b_NRD)
        torch.testing.assert_close(plain[1], seen)
        # The same features by transformers' own way in give the same.
        given = {key: value for key, value in inputs.items() if key != "pixel_values"}
        given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=seen)}
        expected = said(model, given)
        # To rounding: on some processors the features that lie elsewhere in memory take another way through a product.
        torch.testing.assert_close(within[0], expected[0], atol=1e-4, rtol=1e-4)
        assert within[1] == expected[1]
        assert not torch.equal(within[0], before[0])
        after = said(model, inputs)
        assert torch.equal(after[0], before[0]) and after[1] == before[1]
    assert "get_image_features" not in vars(model.model)


def test_it_is_undone_whatever_happens_and_blocks_may_lie_in_one_another(loaded, inputs, decomposer):
    model = loaded[0]
    before = said(model, inputs)[0]
    with pytest.raises(KeyboardInterrupt), lowrank_tune.attach(model, decomposer):
        raise KeyboardInterrupt
    assert torch.equal(said(model, inputs)[0], before)
    with lowrank_tune.attach(model, decomposer, rank=2):
        alone = said(model, inputs)[0]
        with lowrank_tune.attach(torch.nn.ModuleDict({"wrapped": model}), decomposer):
            assert not torch.equal(said(model, inputs)[0], before)
        assert torch.equal(said(model, inputs)[0], alone)
    assert torch.equal(said(model, inputs)[0], before)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(loaded, inputs, decomposer):
    model = loaded[0]
    before = said(model, inputs)[0]
    with (
        pytest.raises(
            InputError, match=r"an image of \[16, 256\] features, and the decomposer takes \[25, 256\]: .*140 pix"
        ),
        lowrank_tune.attach(model, untrained(25, 256)),
    ):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(InputError, match="rank 7"), lowrank_tune.attach(model, decomposer, rank=7):
        pass
    with (
        pytest.raises(InputError, match="Linear: holds no Qwen2.5-VL"),
        lowrank_tune.attach(torch.nn.Linear(1, 1), decomposer),
    ):
        pass
    assert torch.equal(said(model, inputs)[0], before)


def test_a_model_that_is_given_features_of_several_layers_is_refused(decomposer):
    with torch.device("meta"):
        deep = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
            text_config={"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "bos_token_id": 0},
            vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                           "out_hidden_size": 64, "deepstack_visual_indexes": [1]},
        ))  # fmt: skip
    with pytest.raises(InputError, match="Qwen3VL.*several layers"), lowrank_tune.attach(deep, decomposer):
        pass
