import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook, UnreachableError, _sealed
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.entropy import TOTAL

TOKENS, DIM = 16, 24


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9)) * 0.7 ** torch.arange(DIM)[:, None]
    return torch.randn(n, TOKENS, DIM, generator=generator) @ axes + 0.3


def model(x: Tensor, rank: int = DIM, transform: str = "dct") -> Shared:
    made = Shared(
        x.shape[1],
        x.shape[2],
        rank,
        {"token_transform": transform, "lambda_rate": 10.0},
        torch.Generator().manual_seed(0),
    )
    made.initialise(list(x.split(8)), torch.Generator().manual_seed(1))
    return made


@pytest.fixture(scope="module")
def book() -> Codebook:
    return make_codebook(model(images(40)))


def error(x: Tensor, y: Tensor) -> float:
    return (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(x)).item()


@pytest.mark.parametrize("target", [0.002, 0.01, 0.05, 0.14, 0.5, 0.9])
@pytest.mark.parametrize("transform", ["none", "dct", "learned"])
def test_an_image_comes_back_within_the_error_and_no_finer_than_asked(target, transform):
    book = make_codebook(model(images(40), transform=transform))
    for x in images(3, seed=5):
        found = error(x, book.decode(book.encode(x, target_error=target)))
        assert 0.8 * target < found <= target * (1 + 1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_any_size_of_the_features_gives_as_many_bytes(book, scale):
    x = images(1, seed=5)[0]
    stream = book.encode(x * scale, target_error=0.05)
    assert abs(len(stream) - len(book.encode(x, target_error=0.05))) <= 4
    assert error(x * scale, book.decode(stream)) <= 0.0501


def test_more_bytes_are_nearer_and_never_more_than_allowed(book):
    x, errors = images(1, seed=6)[0], []
    for most in (40, 80, 160, 320):
        stream = book.encode(x, max_bytes=most)
        assert most - 12 <= len(stream) <= most
        errors.append(error(x, book.decode(stream)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["zeros", "constant channel", "outlier", "unlike the data", "one token"])
def test_images_unlike_the_others_are_held_as_well(kind):
    x = images(40)
    if kind == "constant channel":
        x[:, :, 3] = 2.5
    book = make_codebook(model(x))
    x = x[0].clone()
    match kind:
        case "zeros":
            x[:] = 0
        case "outlier":
            x[3, 5] = 1e5
        case "unlike the data":
            x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(3))
        case "constant channel":
            x[4, 3] = -100
        case "one token":
            x[1:] = 0
    y = book.decode(book.encode(x, target_error=0.02))
    assert torch.linalg.vector_norm(x - y) <= 0.0201 * torch.linalg.vector_norm(x)


def test_one_image_is_enough_to_learn_from():
    x = images(1)
    book = make_codebook(model(x))
    assert error(x[0], book.decode(book.encode(x[0], target_error=0.05))) <= 0.0501


def test_a_whole_basis_holds_images_that_differ_where_those_in_training_never_did():
    book = make_codebook(model(torch.ones(5, TOKENS, DIM)))
    x = images(1, seed=5)[0]
    assert error(x, book.decode(book.encode(x, target_error=0.01))) <= 0.0101


def test_what_the_rank_cannot_hold_is_refused_with_what_it_can():
    book = make_codebook(model(images(40), rank=4))
    with pytest.raises(UnreachableError, match=r"rank 4 holds this image to a relative error of 0\.\d+, not 0\.01"):
        book.encode(images(1, seed=5)[0], target_error=0.01)
    with pytest.raises(UnreachableError, match="7 bytes or less"):
        book.encode(images(1, seed=5)[0], max_bytes=7)


def test_a_stream_cut_short_or_with_a_flipped_bit_is_found(book):
    stream = book.encode(images(1, seed=5)[0], target_error=0.05)
    broken = [stream[:end] for end in range(len(stream))]
    broken += [
        stream[:at] + bytes([stream[at] ^ 1 << bit]) + stream[at + 1 :] for at in range(len(stream)) for bit in (0, 7)
    ]
    for each in broken:
        with pytest.raises(ValueError):
            book.decode(each)


@pytest.mark.parametrize("size", [-(2**15), -(2**14), 0, 2**14, 2**15 - 1])
@pytest.mark.parametrize("step", [-(2**15), -5000, -1536, 0, 2**15 - 1])
def test_bytes_of_no_image_under_a_right_checksum_are_refused_or_finite(book, size, step):
    adaptive = Codebook(book._arrays | {"adaptation": np.array([16], np.int32)})
    for payload in (b"", b"\1\0\0\0", b"abc", np.random.default_rng(1).bytes(400)):
        try:
            read = adaptive.decode(_sealed(size, step, payload))
        except ValueError:
            continue
        assert read.isfinite().all()


@pytest.mark.parametrize("position", [0, TOKENS - 1])
def test_one_giant_token_is_held_whatever_it_makes_others_be_thought(book, position):
    adaptive = Codebook(book._arrays | {"adaptation": np.array([32], np.int32)})
    x = images(1, seed=5)[0]
    x[position] *= 1e8
    assert error(x, adaptive.decode(adaptive.encode(x, target_error=2e-4))) <= 2e-4 * (1 + 1e-3)


def test_numbers_near_the_largest_come_back_finite_and_others_are_refused(book):
    x = torch.full((TOKENS, DIM), 3.4e38)
    back = book.decode(book.encode(x, target_error=0.05)).double()
    assert (back - x.double()).norm() / x.double().norm() <= 0.0501
    for value in (torch.inf, torch.nan):
        x[0, 0] = value
        with pytest.raises(ValueError, match="not finite"):
            book.encode(x, target_error=0.05)


def test_bytes_suffice_or_not_for_zeros_and_where_nothing_differs_from_the_mean():
    book = make_codebook(model(torch.ones(5, TOKENS, DIM), rank=4))
    for x in (torch.zeros(TOKENS, DIM), torch.ones(TOKENS, DIM), images(1)[0]):
        assert len(book.encode(x, max_bytes=8)) == 8
        with pytest.raises(UnreachableError, match="7 bytes or less"):
            book.encode(x, max_bytes=7)


def test_a_codebook_whose_arrays_are_missing_or_do_not_fit_is_none(book, tmp_path):
    arrays, path = book._arrays, tmp_path / "codebook.safetensors"
    for name, array in arrays.items():
        changed = [array[:-1], array[None], array.astype(np.float64), *([array * 0] if name == "counts" else [])]
        for part in (None, *changed):
            left = {key: each for key, each in arrays.items() if key != name}
            save_file(left if part is None else left | {name: np.ascontiguousarray(part)}, path)
            if part is not None and name == "powers" and part.dtype == np.int64 and part.ndim == 1:
                continue  # of any length
            with pytest.raises(InputError, match="not a codebook"):
                Codebook.load(path)


def test_a_codebook_read_back_gives_the_same_streams_and_holds_whole_numbers_alone_for_decoding(book, tmp_path):
    book.save(tmp_path / "codebook.safetensors")
    again, x = Codebook.load(tmp_path / "codebook.safetensors"), images(1, seed=5)[0]
    stream = book.encode(x, target_error=0.05)
    assert again.encode(x, target_error=0.05) == stream
    assert torch.equal(again.decode(stream), book.decode(stream))
    arrays = load_file(tmp_path / "codebook.safetensors")
    floats = {name for name, array in arrays.items() if array.dtype.kind == "f"}
    assert floats == {"basis", "mean", "transform", "border"}  # none of which has a say in what is read
    (tmp_path / "cut").write_bytes((tmp_path / "codebook.safetensors").read_bytes()[:200])
    for name in ("cut", "absent"):
        with pytest.raises(InputError, match=f"{name}: not a codebook"):
            Codebook.load(tmp_path / name)


def test_streams_are_within_3_percent_of_what_their_tables_make_ideal(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(9, 64, 64, generator=generator) * 0.998 + 0.001)
    book = make_codebook(model(x, rank=64, transform="none"))
    tables = np.split(book._arrays["counts"], np.cumsum(book._arrays["symbols"])[:-1])
    counts = {id(model): table for model, table in zip(book._tables.models, tables, strict=True)}
    bits: list[float] = []

    class Counting:
        """An entropy coder that counts what an ideal one would write."""

        def encode_reverse(self, symbols, model):
            bits.append(-np.log2(counts[id(model)][symbols] / TOTAL).sum() if id(model) in counts else 0.0)

        def get_compressed(self):
            return np.zeros(0, np.uint32)

    for target in (0.01, 0.05, 0.2, 0.5):
        stream = book.encode(x[8], target_error=target)
        with monkeypatch.context() as patched:
            patched.setattr("constriction.stream.stack.AnsCoder", Counting)
            bits.clear()
            book.encode(x[8], target_error=target)
        assert len(stream) > 600
        assert sum(bits) / 8 <= len(stream) <= 1.01 * sum(bits) / 8 + 16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("transform", ["none", "dct"])
def test_bytes_are_counted_as_they_are_written_and_a_step_of_ones_own_is_among_them(transform, scale):
    made = model(images(40), transform=transform)
    with torch.no_grad():
        made.log_scale_TR += torch.randn(made.log_scale_TR.shape, generator=torch.Generator().manual_seed(2))
        made.adaptation.fill_(0.05)
    book = make_codebook(made)
    for target in (0.001, 0.05, 0.3):
        for x in scale * images(3, seed=5) * torch.tensor([1.0] * (TOKENS - 1) + [20.0])[:, None]:
            stream, (size, lost) = book.encode(x, target_error=target), book.count(x, target_error=target)
            assert abs(len(stream) - size) <= 4
            assert lost == pytest.approx(error(x, book.decode(stream)), rel=1e-3)
    step = 0.1
    size, lost = book.count(x, step=step)
    assert lost < step
    assert abs(len(book.encode(x, target_error=lost * (1 + 1e-9))) - size) <= 12
    assert book.count(torch.zeros_like(x), step=step) == (len(book.encode(torch.zeros_like(x), target_error=0.1)), 0.0)
