"""The data sets of the command line, read from local files. Nothing is ever downloaded."""

from pathlib import Path

from gpu_mixmatch._validation import (
    MOST_PADDING,
    as_integer,
    as_path,
    check_callable,
    check_choice,
    shown,
)
from gpu_mixmatch.data import folder
from gpu_mixmatch.data.check import Decoder
from gpu_mixmatch.data.folder import FolderData, ImageFiles, OnError, Progress
from gpu_mixmatch.data.formats import cifar, digits, mnist
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.data.index import PathLike

__all__ = ["FolderData", "ImageData", "ImageFiles", "load_dataset"]

_CONTENTS = {
    **dict.fromkeys(mnist.MNIST_FOLDERS, mnist.CONTENTS),
    **cifar.CONTENTS,
    "folder": folder.CONTENTS,
}


def load_dataset(
    name: str,
    root: str | Path | None = None,
    size: int = 32,
    *,
    on_error: OnError = "raise",
    list_path: PathLike | None = None,
    decoder: Decoder = "pil",
    progress: Progress | None = None,
) -> ImageData | FolderData:
    """Load a data set from local files.

    - ``digits`` comes with scikit-learn: 8x8 grey images, 1297 to train and 500 to test. The rows
      were written by 13 people, one after another, so the last rows would test on writers never
      seen in training, and on three or four of them only. The test rows are spread evenly over
      each class instead: both parts hold every writer and, as nearly as 500 allows, the same share
      of each class. Accuracy on it therefore says nothing about new writers.
    - ``mnist`` and ``fashion-mnist`` are four IDX files, plain or ``.gz``, in ``root``,
      ``root/raw``, or ``root/MNIST/raw`` (``root/FashionMNIST/raw``). Debian's package
      ``dataset-fashion-mnist`` puts them in ``/usr/share/datasets/fashion-mnist``.
    - ``cifar10`` and ``cifar100`` (fine labels) are the binary or the python version, extracted
      (``root`` is the folder or its parent) or as the original ``.tar.gz`` in ``root``. Where
      several are there, extracted comes before archive and binary before python.
    - ``folder`` is a folder of JPEG, PNG, WebP, BMP or TIFF files: ``root/labelled/CLASS/``,
      ``root/unlabelled/`` and, to test on, ``root/test/CLASS/``. They are decoded when they are
      asked for, but for the test images. What is passed over, `images.image_folder` tells.

    Args:
        name: One of ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``,
            ``folder``.
        root: Folder that holds the files; not used for ``digits``.
        size: Height and width that the images of a ``folder`` are brought to, in pixels.
        on_error: Of a ``folder``: "raise" names a file that does not decode when it is asked for;
            "skip" decodes all of them now and leaves out those that fail, with one warning.
        list_path: Of a ``folder``: a list of images, as `check_images` writes it; others are left
            out. None takes all.
        decoder: Of a ``folder``: what will decode its files in training, "pil" or "dali", and so
            does it for ``on_error="skip"``. Test images are always Pillow's.
        progress: Called with the number of images decoded so far and of all, for "skip".

    Returns:
        Images as given in the files, in file order.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, a file is damaged, a class keeps
            no image, or an option of a folder is given for another data set.
        FileNotFoundError: If ``root`` does not hold the files.
        ImportError: If ``digits`` is asked for and scikit-learn is not installed.
    """
    names = ["digits", *_CONTENTS]
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}, got {shown(name)}")
    size = as_integer("size", size, least=1, most=MOST_PADDING)
    check_choice("on_error", on_error, OnError)
    check_choice("decoder", decoder, Decoder)
    list_path = None if list_path is None else as_path("list_path", list_path)
    if progress is not None:
        check_callable("progress", progress, "a function of two numbers or None")
    if name != "folder" and (on_error != "raise" or list_path is not None):
        raise ValueError(
            "on_error must be 'raise' and list_path None for a data set that is no folder of "
            f"images, got {on_error!r} and {list_path} for {name!r}"
        )
    if name == "digits":
        return digits.load_digits_data()
    if root is None:
        raise ValueError(
            f"root must be a folder with {_CONTENTS[name]} for {name}, got None; "
            "nothing is downloaded"
        )
    root = as_path("root", root).expanduser()
    if name == "folder":
        return folder.load_folder(
            root,
            size,
            on_error=on_error,
            list_path=list_path,
            decoder=decoder,
            progress=progress,
        )
    return cifar.load_cifar(name, root) if name in cifar.CONTENTS else mnist.load_mnist(name, root)
