"""The data sets of the command line, read from local files. Nothing is ever downloaded."""

from pathlib import Path

from gpu_mixmatch.data import folder
from gpu_mixmatch.data.folder import FolderData, ImageFiles
from gpu_mixmatch.data.formats import cifar, digits, mnist
from gpu_mixmatch.data.formats.common import ImageData

__all__ = ["FolderData", "ImageData", "ImageFiles", "load_dataset"]

_CONTENTS = {
    **dict.fromkeys(mnist.MNIST_FOLDERS, mnist.CONTENTS),
    **cifar.CONTENTS,
    "folder": folder.CONTENTS,
}


def load_dataset(
    name: str, root: str | Path | None = None, size: int = 32
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
    - ``folder`` is a folder of JPEG, PNG or WebP files: ``root/labelled/CLASS/``,
      ``root/unlabelled/`` and, to test on, ``root/test/CLASS/``. They are decoded when they are
      asked for, but for the test images.

    Args:
        name: One of ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``,
            ``folder``.
        root: Folder that holds the files; not used for ``digits``.
        size: Height and width that the images of a ``folder`` are brought to, in pixels.

    Returns:
        Images as given in the files, in file order.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, or a file is damaged.
        FileNotFoundError: If ``root`` does not hold the files.
        ImportError: If ``digits`` is asked for and scikit-learn is not installed.
    """
    if name == "digits":
        return digits.load_digits_data()
    if name not in _CONTENTS:
        names = ", ".join(["digits", *_CONTENTS])
        raise ValueError(f"name must be one of {names}, got {name!r}")
    if root is None:
        raise ValueError(
            f"root must be a folder with {_CONTENTS[name]} for {name}, got None; "
            "nothing is downloaded"
        )
    root = Path(root).expanduser()
    if name == "folder":
        return folder.load_folder(root, size)
    return cifar.load_cifar(name, root) if name in cifar.CONTENTS else mnist.load_mnist(name, root)
