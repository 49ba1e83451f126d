"""TensorBoardInsight: previews of batches and the quality of guesses in TensorBoard."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpu_mixmatch._validation import as_integer, came, check_kind
from gpu_mixmatch.insight.guesses import GuessWatch, as_truth, call_arguments
from gpu_mixmatch.insight.preview import MOST_PREVIEWED, as_class_names, draw_preview
from gpu_mixmatch.methods.mixmatch import MixMatch


class TensorBoardInsight:
    """Write a preview of the batch and the quality of the guesses to TensorBoard.

    Before each step that is a multiple of ``every_n_steps`` it writes the image
    ``mixmatch/preview``, drawn by `draw_preview`, and the scalars ``mixmatch/confidence`` and
    ``mixmatch/accuracy`` of all guesses since the last time. Other steps do not wait for the
    device. Training goes on as without it, to the last bit.

    A preview calls the model: where its forward pass communicates (DDP, SyncBatchNorm), every rank
    needs one of these, with a writer of its own.

    Args:
        mixmatch: The builder.
        writer: A `SummaryWriter`, of torch or of tensorboardX.
        every_n_steps: Steps of the builder from one time to the next.
        truth: True labels, as for `GuessWatch`.
        class_names: Names of the L classes, for the preview; None shows their numbers.
        rows: Rows of the preview, of each kind.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
        ImportError: In a step, if matplotlib is not installed.
    """

    def __init__(
        self,
        mixmatch: MixMatch,
        writer: Any,
        every_n_steps: int = 100,
        *,
        truth: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        rows: int = 4,
    ) -> None:
        check_kind("mixmatch", mixmatch, MixMatch, "a MixMatch")
        for method in ("add_scalar", "add_image"):
            if isinstance(writer, type) or not callable(getattr(writer, method, None)):
                raise TypeError(
                    f"writer must be a SummaryWriter, with add_scalar and add_image, got "
                    f"{came(writer)}"
                )
        self.mixmatch = mixmatch
        self.writer = writer
        self.every_n_steps = as_integer("every_n_steps", every_n_steps, least=1)
        self.truth = None if truth is None else as_truth(truth)
        self.class_names = as_class_names(class_names, mixmatch.num_classes)
        self.rows = as_integer("rows", rows, least=1, most=MOST_PREVIEWED)
        self._handle = mixmatch.register_forward_pre_hook(self._before, with_kwargs=True)
        self._watch = GuessWatch(mixmatch, truth)

    def close(self) -> None:
        """Write the quality of the guesses since the last time, and stop."""
        self._write_quality()
        self._handle.remove()
        self._watch.close()

    def _before(self, mixmatch: nn.Module, args: Any, kwargs: Any) -> None:
        # the preview calls the builder, and its hooks must not count that
        if self._watch.paused or int(self.mixmatch.step) % self.every_n_steps:
            return
        self._write_quality()
        self._watch.paused = True
        try:
            self._write_preview(call_arguments(self.mixmatch, args, kwargs))
        finally:
            self._watch.paused = False

    def _write_quality(self) -> None:
        quality = self._watch.read()
        if quality is None:
            return
        step = int(self.mixmatch.step)
        self.writer.add_scalar("mixmatch/confidence", quality.confidence, step)
        if quality.accuracy is not None:
            self.writer.add_scalar("mixmatch/accuracy", quality.accuracy, step)

    def _write_preview(self, call: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = draw_preview(
                self.mixmatch,
                path=Path(folder, "preview.png"),
                class_names=self.class_names,
                rows=self.rows,
                **call,
            )
            import matplotlib.image

            picture = matplotlib.image.imread(path)  # [H, W, 4] float in [0, 1]
        step = int(self.mixmatch.step)
        self.writer.add_image("mixmatch/preview", picture, step, dataformats="HWC")
