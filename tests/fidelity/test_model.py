"""The tiny language model, asked about features in place of pixels."""

import json
import shutil

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from lowrank_tune.errors import InputError
from lowrank_tune.fidelity.model import LanguageModel, identity_of

QUESTION = "what is in this picture?"
MOST = 12


@pytest.fixture(scope="module")
def prompt(language_model):
    return language_model.prompt(QUESTION)


@pytest.fixture(scope="module")
def from_pixels(model_root, squares_NHWC):
    """What transformers' own processor makes of an image and a question."""
    (directory,) = (model_root / "checkpoints").iterdir()
    processor = AutoProcessor.from_pretrained(directory)

    def make(number):
        content = [
            {"type": "image", "image": Image.fromarray(squares_NHWC[number])},
            {"type": "text", "text": QUESTION},
        ]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_resize": False},
        )

    return make


def divergence(first_PV, other_PV):
    """KL(first ‖ other), mean over positions."""
    first_PV, other_PV = first_PV.double(), other_PV.double()
    return float((first_PV.exp() * (first_PV - other_PV)).sum(-1).mean())


def at_rank(x_NTD, rank):
    u_NTK, _, _ = torch.linalg.svd(x_NTD.double(), full_matrices=False)
    basis_NTR = u_NTK[..., :rank]
    return (basis_NTR @ (basis_NTR.mT @ x_NTD.double())).float()


def test_a_prompt_is_what_transformers_own_processor_makes(prompt, from_pixels):
    made = from_pixels(0)
    assert torch.equal(prompt.input_ids_1L, made["input_ids"])
    assert torch.equal(prompt.mm_token_type_ids_1L, made["mm_token_type_ids"])
    assert torch.equal(prompt.image_grid_thw_13, made["image_grid_thw"])


def test_logits_from_features_are_those_from_pixels_to_the_bit(language_model, prompt, from_pixels, x_NTD):
    for number in (0, 5):
        with torch.inference_mode():
            expected = language_model.model(**from_pixels(number)).logits
            assert torch.equal(language_model.model(**prompt.inputs(x_NTD[number : number + 1])).logits, expected)


def test_without_the_types_of_tokens_the_image_would_lie_elsewhere_and_nothing_would_tell(
    language_model, prompt, x_NTD
):
    inputs = prompt.inputs(x_NTD[:1])
    with torch.inference_mode():
        right = language_model.model(**inputs).logits
        del inputs["mm_token_type_ids"]
        wrong = language_model.model(**inputs).logits
    assert divergence(right[0, -1:].log_softmax(-1), wrong[0, -1:].log_softmax(-1)) > 1e-3


def test_an_answer_is_the_likeliest_token_each_time_and_hangs_on_the_image(language_model, prompt, x_NTD):
    answers = [language_model.answer(x_TD, prompt, MOST) for x_TD in x_NTD]
    for x_TD, answer in zip(x_NTD, answers, strict=True):
        heard_PV = language_model.hear(x_TD[None], prompt, answer.ids)[0]
        assert heard_PV.argmax(-1).tolist() == list(answer.ids)
        assert answer.cut == (answer.ids[-1] != language_model.model.config.text_config.eos_token_id)
        assert len(answer.ids) == MOST or not answer.cut
    assert len({answer.text for answer in answers}) > 4
    assert not all(answer.cut for answer in answers)
    assert any(" " in answer.text for answer in answers)


def test_what_is_heard_of_many_forms_at_once_is_what_is_heard_of_each(language_model, prompt, x_NTD):
    ids = language_model.answer(x_NTD[0], prompt, MOST).ids
    forms_NTD = torch.cat([x_NTD[:1], *(at_rank(x_NTD[:1], rank) for rank in (2, 8))])
    together_NPV = language_model.hear(forms_NTD, prompt, ids)
    apart_NPV = torch.cat([language_model.hear(form_TD[None], prompt, ids) for form_TD in forms_NTD])
    assert together_NPV.shape == (3, len(ids), language_model.model.config.text_config.vocab_size)
    torch.testing.assert_close(together_NPV, apart_NPV, rtol=0, atol=1e-4)
    assert torch.allclose(together_NPV.exp().sum(-1), torch.ones(()), atol=1e-5)


def test_full_rank_diverges_by_nothing_and_less_rank_by_more(language_model, prompt, x_NTD):
    means = []
    for rank in (2, 8, min(x_NTD.shape[1:])):
        apart = []
        for x_TD, low_TD in zip(x_NTD, at_rank(x_NTD, rank), strict=True):
            ids = language_model.answer(x_TD, prompt, MOST).ids
            first_PV, again_PV, other_PV = language_model.hear(torch.stack([x_TD, x_TD, low_TD]), prompt, ids)
            assert divergence(first_PV, again_PV) < 1e-9
            apart.append(divergence(first_PV, other_PV))
        means.append(sum(apart) / len(apart))
    assert means[0] > means[1] > means[2]
    assert means[2] < 1e-6


def test_the_gradient_tells_how_an_answers_likelihood_moves(language_model, prompt, x_NTD):
    ids = language_model.answer(x_NTD[0], prompt, MOST).ids
    gradient_TD = language_model.answer_gradient(x_NTD[0], prompt, ids)
    direction_TD = torch.randn(x_NTD[0].shape, generator=torch.Generator().manual_seed(0))
    direction_TD += gradient_TD * direction_TD.norm() / gradient_TD.norm()

    def likelihood(x_TD):
        heard_PV = language_model.hear(x_TD[None], prompt, ids)[0].double()
        return float(heard_PV[range(len(ids)), list(ids)].sum())

    step = 1e-3
    moved = likelihood(x_NTD[0] + step * direction_TD) - likelihood(x_NTD[0] - step * direction_TD)
    assert moved / (2 * step) == pytest.approx(float((gradient_TD * direction_TD).sum()), rel=0.02)


def test_that_features_are_those_of_the_pixels_is_told(language_model, squares_NHWC, x_NTD):
    assert language_model.pixels_agree(squares_NHWC[3], x_NTD[3]).endswith("to the bit")
    rounded = language_model.pixels_agree(squares_NHWC[3], x_NTD[3].bfloat16())
    assert "in other types than the model's float32" in rounded
    assert "1.0e-01 of their length away" in language_model.pixels_agree(squares_NHWC[3], 1.1 * x_NTD[3])


@pytest.fixture
def copied(tmp_path, model_root, asked_features):
    """A directory checkpoint that may be spoilt, and a study's section that names it."""
    (directory,) = (model_root / "checkpoints").iterdir()
    at = shutil.copytree(directory, tmp_path / "checkpoint")
    return at, asked_features.model_copy(
        update={"encoder": asked_features.encoder.model_copy(update={"checkpoint": str(at)})}
    )


def keep(at, wanted):
    """Leave only some tensors, in one file."""
    tensors = {key: value for path in sorted(at.glob("model-*")) for key, value in load_file(path).items()}
    for path in at.glob("model*"):
        path.unlink()
    save_file({key: value for key, value in tensors.items() if wanted(key)}, at / "model.safetensors")


def without(at, *names):
    for name in names:
        (at / name).unlink()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_template(at):
    without(at, "chat_template.json")
    edit(at / "tokenizer_config.json", lambda config: config.pop("chat_template"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: keep(at, lambda key: "visual" in key), "a vision tower alone; of its 30 tensors none .*layers.0"),
        (lambda at: keep(at, lambda key: "lm_head" not in key), "its weights lack lm_head.weight; name a whole"),
        (lambda at: keep(at, lambda key: "layers.1" not in key), "its weights lack model.*layers.1.* and 11 more"),
        (lambda at: without(at, "model-00001-of-00003.safetensors"), "'model-00001-of-00003.safetensors' is missing"),
        (lambda at: without(at, "tokenizer.json"), "has no tokenizer .no tokenizer.json and no vocab.json.*copy the"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
        (no_template, "has no chat template .*copy it from"),
        (lambda at: edit(at / "config.json", lambda c: c.update(model_type="qwen3_vl")), "'qwen3_vl', not a Qwen2.5"),
        (lambda at: edit(at / "config.json", lambda c: c.update(intermediate_size=65)), "transformers cannot load it"),
    ],
)  # fmt: skip
def test_what_is_no_whole_model_is_refused_with_what_is_missing(copied, tmp_path, spoil, message):
    at, features = copied
    spoil(at)
    with pytest.raises(InputError, match=message):
        LanguageModel(features, tmp_path)


def test_a_question_that_places_another_image_is_refused(language_model):
    with pytest.raises(InputError, match="makes room for 2 images .* question '<.image_pad.>what.'.*without that word"):
        language_model.prompt("<|image_pad|>what?")


def test_a_template_that_places_no_image_is_refused(copied, tmp_path):
    at, features = copied
    no_template(at)
    (at / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    model = LanguageModel(features, tmp_path)
    with pytest.raises(InputError, match="makes room for 0 images .<.image_pad.>. of the question 'what.*copy chat_te"):
        model.prompt(QUESTION)
    model.tokenizer.chat_template = "{{ messages[0]['content'] + 'text' }}"
    with pytest.raises(InputError, match="its chat template cannot be followed"):
        model.prompt(QUESTION)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(asked_features, model_root, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=4_000_000))
    with pytest.raises(InputError, match=r"takes 0.0 GB in float32, and cpu has 0.0 GB free; .*fidelity.device"):
        LanguageModel(asked_features, model_root)


def test_another_model_is_another_identity_wherever_it_lies(copied, tmp_path, asked_features, model_root):
    at, features = copied
    first = identity_of(asked_features, model_root)
    assert identity_of(features, tmp_path)["model"] == first["model"]
    keep(at, lambda key: True)
    assert identity_of(features, tmp_path)["model"] == first["model"]
    edit(at / "tokenizer_config.json", lambda config: config.update(chat_template="{{ 1 }}"))
    assert identity_of(features, tmp_path)["model"] != first["model"]
