"""IDX files: bytes written by hand, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch

from slimgemm.benchmarks import digits

IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3]) + bytes([1, 2, 3, 250, 251, 255])


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_folder(folder, train=20, test=8, side=8, end="", **changed):
    """The four files of a data set of random images; `changed` replaces the bytes of one."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        images, labels = digits.IDX_FILES[part]
        content = {
            images: idx(rng.integers(0, 256, (count, side, side))),
            labels: idx(np.arange(count) % 4),
        }
        for name, raw in content.items():
            raw = changed.get(name.replace("-", "_"), raw)
            (folder / (name + end)).write_bytes(gzip.compress(raw) if end == ".gz" else raw)
    return folder


def test_read_idx_gives_the_bytes_in_order(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(IMAGES)
    assert digits.read_idx(path).tolist() == [[[1, 2, 3]], [[250, 251, 255]]]


def test_read_idx_tells_gzip_by_its_bytes(tmp_path):
    path = tmp_path / "images"  # no .gz in the name
    path.write_bytes(gzip.compress(IMAGES))
    assert digits.read_idx(path).shape == (2, 1, 3)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        pytest.param(IMAGES[:-1], "truncated.*asks for 6 bytes.*has 5", id="one byte short"),
        pytest.param(IMAGES + b"\0", "too long.*asks for 6 bytes.*has 7", id="one byte long"),
        pytest.param(IMAGES[:10], "ends inside its header, 10 bytes", id="short header"),
        pytest.param(b"", "starts with nothing", id="empty"),
        pytest.param(b"\x89PNG" + IMAGES, "starts with 89 50 4e 47", id="png"),
        pytest.param(b"\0\0\x0d" + IMAGES[3:], "element type is 0x0d", id="floats"),
        pytest.param(gzip.compress(IMAGES)[:-9], "cannot be read", id="truncated gzip"),
        pytest.param(
            bytes([0, 0, 8, 3]) + b"\xff" * 12, "truncated.*has 0", id="sizes beyond any file"
        ),
    ],
)
def test_read_idx_refuses_and_names_the_file(tmp_path, raw, text):
    path = tmp_path / "broken-file"
    path.write_bytes(raw)
    with pytest.raises(digits.DataError, match=text) as found:
        digits.read_idx(path)
    assert "broken-file" in str(found.value)


@pytest.mark.parametrize("end", ["", ".gz"], ids=["plain", "gz"])
def test_load_normalises_by_the_training_images(tmp_path, end):
    data = digits.load(write_folder(tmp_path / "set", end=end))
    assert data.train_x.shape == (20, 1, 8, 8) and data.test_x.shape == (8, 1, 8, 8)
    assert data.train_y.dtype == torch.int64 and data.classes == 4 and data.image == (8, 8)
    assert abs(float(data.train_x.mean())) < 1e-5
    assert abs(float(data.train_x.std()) - 1) < 1e-5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(
            {"train_labels_idx1_ubyte": idx(np.arange(19) % 4)},
            r"train-labels-idx1-ubyte: must be \[20\].*got \[19\]",
            id="labels of another set",
        ),
        pytest.param(
            {"t10k_images_idx3_ubyte": idx(np.ones((8, 9, 9)))},
            r"training images are \[8, 8\], test images \[9, 9\]",
            id="two sizes",
        ),
        pytest.param(
            {"train_images_idx3_ubyte": idx(np.ones((20, 8, 8)))}, "are equal", id="blank images"
        ),
        pytest.param(
            {"train_images_idx3_ubyte": idx(np.ones(20))}, r"got \[20\]", id="images are labels"
        ),
    ],
)
def test_load_refuses_files_that_do_not_belong_together(tmp_path, change, text):
    with pytest.raises(digits.DataError, match=text):
        digits.load(write_folder(tmp_path / "set", **change))


def test_load_refuses_small_images_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(digits.DataError, match="at least 8 x 8"):
        digits.load(write_folder(tmp_path / "small", side=7))
    folder = write_folder(tmp_path / "set")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(digits.DataError, match=r"neither t10k-labels-idx1-ubyte nor .*gz"):
        digits.load(folder)
    with pytest.raises(digits.DataError, match="is not a folder"):
        digits.load(tmp_path / "none")


def test_handwritten_digits_are_split_the_same_way_each_time():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    first, second = digits.load(), digits.load()
    assert len(first.train_y) == 1437 and len(first.test_y) == 360 and first.classes == 10
    assert torch.equal(first.test_x, second.test_x) and torch.equal(first.train_y, second.train_y)
