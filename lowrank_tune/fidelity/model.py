"""The language model of a study's checkpoint, asked about features in place of pixels.

N forms of one image's features, T tokens, D dim, L tokens of a prompt, P positions of an answer, V words.

Features go in through `mm_encoder_outputs`, beside the ids and what tells where in them the image is and how its tokens
lie: transformers then does with them what it does with those of pixels, to the bit. Without `mm_token_type_ids` it
would place them as if they were text, and say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import CheckpointConfig, ModelFiles, find_model, read_checkpoint_config
from lowrank_tune.features.tiny import quiet_transformers
from lowrank_tune.lowrank.device import is_out_of_memory

_WHOLE = "name a whole Qwen2.5-VL checkpoint as `save_pretrained` writes it, or remove `fidelity`"
_BESIDE_WEIGHTS = 1.1
"""What a model takes while it works, in parts of its weights: activations of one pass, and the words' probabilities."""

_ROUNDING = 0.05
"""What computing and storing features in bfloat16 changes of their length stays below it: 0.01 or so."""


@dataclass(frozen=True)
class Prompt:
    """A question about one image, ready for the model."""

    input_ids_1L: Tensor
    mm_token_type_ids_1L: Tensor  # 1 where the image's tokens are
    image_grid_thw_13: Tensor

    def inputs(self, x_NTD: Tensor, ids: Sequence[int] = ()) -> dict[str, Any]:
        """What `forward` and `generate` take of N forms of the image, each with the same answer behind the question."""
        count = len(x_NTD)
        said_1P = torch.tensor([list(ids)], dtype=torch.int64, device=self.input_ids_1L.device)
        input_ids_1L = torch.cat([self.input_ids_1L, said_1P], dim=1)
        types_1L = torch.cat([self.mm_token_type_ids_1L, torch.zeros_like(said_1P)], dim=1)
        return {
            "input_ids": input_ids_1L.expand(count, -1),
            "attention_mask": torch.ones_like(input_ids_1L).expand(count, -1),
            "mm_token_type_ids": types_1L.expand(count, -1),
            "image_grid_thw": self.image_grid_thw_13.expand(count, -1),
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(x_NTD))},
        }


@dataclass(frozen=True)
class Answer:
    """What the model says of itself, the likeliest token each time."""

    ids: tuple[int, ...]  # with the token that ends it
    text: str
    cut: bool  # it would have gone on


class LanguageModel:
    """The whole checkpoint of a study on a device.

    On a GPU it computes in the study's `compute_dtype`, as the tower did; on a CPU in float32 whatever that is, since
    bfloat16 is emulated on most, and its rounding would hide divergences that are smaller.

    Args:
        features: a study's section: which checkpoint, and of images of which size.
        cache_root: the folder of the caches.
        device: `cpu`, or a GPU's name.

    Raises:
        InputError: the checkpoint is no whole model, has no tokenizer or chat template, or does not fit the device.
    """

    def __init__(self, features: FeaturesSpec, cache_root: Path, device: str = "cpu") -> None:
        self.config, files = _located(features, cache_root)
        self.device = torch.device(device)
        self.dtype = getattr(torch, features.encoder.compute_dtype) if self.device.type == "cuda" else torch.float32
        self._size = features.encoder.image_size
        _check_room(self.config, files, self.dtype, self.device)
        try:
            with quiet_transformers():
                self.model = _load(self.config, files, self.dtype).to(self.device)
        except (RuntimeError, MemoryError) as error:
            raise self._explained(error, "while it is loaded") from error
        self.tokenizer = _load_tokenizer(self.config, files)
        ends = self.model.generation_config.eos_token_id
        ends = ends if ends is not None else self.model.config.get_text_config().eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        # Nothing but the likeliest token: a published model's own settings draw lots and punish repetition.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self._ends), pad_token_id=min(self._ends)
        )

    def prompt(self, question: str) -> Prompt:
        """Put a question about one image into the model's own words for a conversation.

        Raises:
            InputError: the chat template cannot be followed, or places another number of images than one.
        """
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.config.name}: its chat template cannot be followed ({error}); copy chat_template.json from the "
                "model that this one was made from"
            ) from error
        place = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        if text.count(place) != 1:
            raise InputError(
                f"{self.config.name}: its chat template makes room for {text.count(place)} images ({place}) of the "
                f"question {question!r}, not for one; ask it without that word, or copy chat_template.json from the "
                "model that this one was made from"
            )
        tokens, side = self.config.shape(self._size)[0], self._size // self.config.vision["patch_size"]
        told = self.tokenizer(text.replace(place, place * tokens), add_special_tokens=False, return_tensors="pt")
        input_ids_1L = told["input_ids"].to(self.device)
        return Prompt(
            input_ids_1L,
            (input_ids_1L == self.model.config.image_token_id).long(),
            torch.tensor([[1, side, side]], device=self.device),
        )

    def answer(self, x_TD: Tensor, prompt: Prompt, max_new_tokens: int) -> Answer:
        """Answer from features; an InputError where the memory does not suffice."""
        return self.answers(x_TD[None], prompt, max_new_tokens)[0]

    @torch.inference_mode()
    def answers(self, x_NTD: Tensor, prompt: Prompt, max_new_tokens: int) -> list[Answer]:
        """Answer one question from each of N forms of an image, together or as `hear`; errors as `answer`."""
        try:
            inputs = prompt.inputs(self._taken(x_NTD))
            told_NL = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        except RuntimeError as error:
            if len(x_NTD) == 1 or not is_out_of_memory(error):
                raise self._explained(error, "with a single image") from error
        else:
            return [self._read(ids) for ids in told_NL[:, prompt.input_ids_1L.shape[1] :].tolist()]
        torch.cuda.empty_cache()
        half = len(x_NTD) // 2
        parts = (x_NTD[:half], x_NTD[half:])
        return [answer for part_NTD in parts for answer in self.answers(part_NTD, prompt, max_new_tokens)]

    def _read(self, ids: list[int]) -> Answer:
        """An answer up to the token that ends it: what follows fills it up to the longest of those beside it."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        own = ids if end is None else ids[: end + 1]
        return Answer(tuple(own), self.tokenizer.decode(own, skip_special_tokens=True).strip(), end is None)

    @torch.inference_mode()
    def hear(self, x_NTD: Tensor, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """Log-probabilities [N, P, V] of the next token, float32, at each position of a given answer, from features.

        In one pass, or in as many as a GPU's memory asks for; an InputError where it does not hold one image.
        """
        try:
            return self._log_probabilities(self._taken(x_NTD), prompt, ids)
        except RuntimeError as error:
            if len(x_NTD) == 1 or not is_out_of_memory(error):
                raise self._explained(error, "with a single image") from error
        torch.cuda.empty_cache()
        half = len(x_NTD) // 2
        return torch.cat([self.hear(part_NTD, prompt, ids) for part_NTD in (x_NTD[:half], x_NTD[half:])])

    def answer_gradient(self, x_TD: Tensor, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """The gradient [T, D], float32, of an answer's log-likelihood by features; errors as `answer`."""
        x_1TD = self._taken(x_TD[None]).clone().requires_grad_()
        try:
            log_1PV = self._log_probabilities(x_1TD, prompt, ids)
            said_1P = torch.tensor([list(ids)], device=self.device)
            likelihood = log_1PV.gather(2, said_1P[..., None]).sum()
            (gradient_1TD,) = torch.autograd.grad(likelihood, x_1TD)
        except RuntimeError as error:
            raise self._explained(error, "with a single image") from error
        return gradient_1TD[0].float()

    @torch.inference_mode()
    def pixels_agree(self, square_HWC: npt.NDArray[np.uint8], x_TD: Tensor) -> str:
        """How far the features of an image are from those that the model itself makes of its pixels, in a sentence."""
        vision, said = self.model.config.vision_config, self.config.preprocessor
        processor = Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            **{key: said[key] for key in ("image_mean", "image_std", "rescale_factor") if said.get(key) is not None},
        )
        batch = processor(
            images=[torch.from_numpy(square_HWC.copy()).permute(2, 0, 1)], do_resize=False, return_tensors="pt"
        ).to(self.device)
        own_TD = self.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output[0].float()
        x_TD = x_TD.to(self.device, torch.float32)
        if torch.equal(own_TD, x_TD):
            return "the features are those that the model makes of the pixels, to the bit"
        apart = float((own_TD - x_TD).norm() / own_TD.norm())
        if apart > _ROUNDING:
            return (
                f"the features are {apart:.1e} of their length away from those that the model makes of the pixels, "
                "more than rounding explains: what is answered tells of these features, and not of the pixels"
            )
        return (
            f"the features are those that the model makes of the pixels up to {apart:.1e} of their length: they were "
            f"computed and stored in other types than the model's {self.dtype}".replace("torch.", "")
        )

    def _log_probabilities(self, x_NTD: Tensor, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        # The last token of the answer is followed by nothing that is asked for.
        logits_NPV = self.model(**prompt.inputs(x_NTD, ids[:-1]), logits_to_keep=len(ids), use_cache=False).logits
        log_NPV: Tensor = torch.log_softmax(logits_NPV.float(), dim=-1)
        return log_NPV

    def _taken(self, x_NTD: Tensor) -> Tensor:
        return x_NTD.to(self.device, self.dtype)

    def _explained(self, error: Exception, when: str) -> Exception:
        """The error itself, or what to do where it means that memory is short."""
        if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            return error
        return InputError(
            f"{self.config.name}: the language model is out of memory on {self.device} {when}; free it of other "
            "programs, or choose another place by fidelity.device"
        )


def identity_of(features: FeaturesSpec, cache_root: Path) -> dict[str, str]:
    """Which language model a study asks: its name, and a digest of its weights and tokenizer; errors as its class."""
    config, files = _located(features, cache_root)
    return {"checkpoint": config.name, "model": files.digest()}


def _located(features: FeaturesSpec, cache_root: Path) -> tuple[CheckpointConfig, ModelFiles]:
    config = read_checkpoint_config(features.encoder.checkpoint, cache_root)
    return config, find_model(config, cache_root)


def _check_room(config: CheckpointConfig, files: ModelFiles, dtype: torch.dtype, device: torch.device) -> None:
    need = files.parameters() * dtype.itemsize * _BESIDE_WEIGHTS
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if need > free:
        what = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{config.name}: the language model takes {need / 1e9:.1f} GB in {what}, and {device} has "
            f"{free / 1e9:.1f} GB free; free it of other programs, choose another place by fidelity.device, or remove "
            "`fidelity`"
        )


def _load(config: CheckpointConfig, files: ModelFiles, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Load the weights, all of them: transformers draws those that it does not find, and goes on."""
    try:
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            files.directory,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # of any kind, by what the files hold
        if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{config.name}: transformers cannot load it ({reason}); {_WHOLE}") from error
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{config.name}: its weights lack {missing[0]}{others}; {_WHOLE}")
    return model.eval().requires_grad_(False)


def _load_tokenizer(config: CheckpointConfig, files: ModelFiles) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.directory, local_files_only=True)
    except Exception as error:  # of any kind, by what the files hold
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{config.name}: its tokenizer cannot be loaded ({reason}); copy the tokenizer's files from the model that "
            "this one was made from"
        ) from error
    template = files.directory / "chat_template.json"  # the processor's, as published
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = json.loads(template.read_bytes()).get("chat_template")
    if tokenizer.chat_template is None:
        raise InputError(
            f"{config.name}: has no chat template (no chat_template.json, no chat_template.jinja, none in "
            "tokenizer_config.json), so a question cannot be put; copy it from the model that this one was made from"
        )
    return tokenizer
