"""Digits: the images of the demo, from scikit-learn or from a folder of IDX files.

IDX (MNIST, Fashion-MNIST): two zero bytes, a type byte (0x08 = uint8), the number of dimensions,
one big-endian 32-bit size per dimension, then the bytes, last dimension fastest. Plain or gzip.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UINT8 = 0x08
MAX_BYTES = 2**31  # of one file, unpacked: 40 times MNIST; a damaged size must not fill the memory
TEST_IMAGES = 360  # of the 1797 in scikit-learn; a fifth
# part -> (images, labels), the names under which MNIST and its successors are published
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class DataError(ValueError):
    """The images cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class Digits:
    """Images and labels, normalised to mean 0 and deviation 1 over the training images.

    Args:
        name: what reports print.
        train_x, test_x: float32 [images, 1, height, width].
        train_y, test_y: int64 [images], 0 <= label < classes.
        classes: number of labels.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def image(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.train_x.shape[2], self.train_x.shape[3]


def load(folder: Path | None = None) -> Digits:
    """scikit-learn's 1797 handwritten digits, or the IDX files of a folder.

    Raises:
        DataError: the folder or a file cannot be used, or scikit-learn is missing.
    """
    return _from_folder(folder) if folder is not None else _from_sklearn()


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, plain or gzip (told by its first bytes, not by its name).

    Raises:
        DataError: not an IDX file of uint8, or its length is not what its header says.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                raw = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: holds more than {MAX_BYTES} bytes; this is no file of digits")
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DataError(
            f"{path}: starts with {raw[:4].hex(' ') or 'nothing'}, an IDX file of bytes "
            "starts with 00 00 08; point --data to a folder of MNIST or Fashion-MNIST files"
        )
    if raw[2] != UINT8:
        raise DataError(f"{path}: element type is 0x{raw[2]:02x}, must be 0x08 (unsigned bytes)")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path}: ends inside its header, {len(raw)} bytes; download it again")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    want = math.prod(shape)
    if len(raw) - start != want:
        state = "truncated" if len(raw) - start < want else "too long"
        raise DataError(
            f"{path}: {state}, its header {list(shape)} asks for {want} bytes of data and it has "
            f"{len(raw) - start}; download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{folder}: has neither {name} nor {name}.gz; --data needs a folder with the four "
        f"IDX files {', '.join(file for pair in IDX_FILES.values() for file in pair)}"
    )


def _part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images_path, labels_path = (_find(folder, name) for name in IDX_FILES[part])
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or min(images.shape) == 0:
        raise DataError(f"{images_path}: must be [images, height, width], got {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{labels_path}: must be [{images.shape[0]}], one label for each image of "
            f"{images_path.name}, got {list(labels.shape)}; take both files from one data set"
        )
    return images, labels


def _from_folder(folder: Path) -> Digits:
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; --data needs a folder of IDX files")
    (train_x, train_y), (test_x, test_y) = (_part(folder, part) for part in IDX_FILES)
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(
            f"{folder}: training images are {list(train_x.shape[1:])}, test images "
            f"{list(test_x.shape[1:])}; take all files from one data set"
        )
    if min(train_x.shape[1:]) < 8:
        raise DataError(f"{folder}: images are {list(train_x.shape[1:])}, at least 8 x 8 is needed")
    return _normalised(folder.resolve().name, train_x, train_y, test_x, test_y)


def _from_sklearn() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn is missing; pip install 'slimgemm[demo]', or give a folder with --data"
        ) from error
    bunch = load_digits()
    # One fixed split for every seed: the spread then comes from the training alone.
    order = np.random.default_rng(0).permutation(len(bunch.target))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    images, labels = bunch.images, bunch.target
    name = "handwritten digits (scikit-learn)"
    return _normalised(name, images[train], labels[train], images[test], labels[test])


def _normalised(
    name: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> Digits:
    train, test = (torch.from_numpy(x.astype(np.float32)).unsqueeze(1) for x in (train_x, test_x))
    mean, deviation = train.mean(), train.std()
    if not float(deviation) > 0:
        raise DataError(f"{name}: all training pixels are equal; these are no images")
    labels = [torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y)]
    classes = 1 + int(max(label.max() for label in labels))
    train, test = (train - mean) / deviation, (test - mean) / deviation
    return Digits(name, train, labels[0], test, labels[1], classes)
