"""Any method in Hugging Face's Trainer. Only this module of the package imports transformers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from gpu_mixmatch._extras import missing_package
from gpu_mixmatch._validation import MOST_IMAGES, as_integer, as_text, check_kind
from gpu_mixmatch.augment.base import complete
from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.loader import SemiSupervisedLoader
from gpu_mixmatch.integrations.steps import as_guess_first, build, check_criterion
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.mixmatch import MixMatch

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise missing_package(error, "transformers", "MixMatchTrainer") from error

_LEARNT = "method.pt"  # in a checkpoint, what a builder has learnt of guesses


class MixMatchTrainer(Trainer):
    """Train an image classifier with any method: a `Trainer` with two training sets.

    A step takes ``per_device_train_batch_size`` labelled images and ``ratio`` times as many
    unlabelled ones on each device, from a `SemiSupervisedLoader`; an epoch is one pass over the
    unlabelled images. Order and shards are the loader's, keyed by ``data_seed`` (or ``seed``).
    Under gradient accumulation each micro-batch is a batch of its own, and losses are averaged.

    The builder's step is the number of the micro-batch, so that a checkpoint need not hold it; what
    a builder has learnt of guesses is in its ``method.pt``. A run that resumes with the same
    arguments ends with the same weights, and fetches no batch that it skips. The parts of the loss,
    such as ``loss_x`` and ``loss_u``, are logged with it and averaged like it, with no
    synchronisation in between. `MixMatch` draws by positions in the batch, other methods by the
    samples' ids.

    Evaluation calls the model as `Trainer` does, with ``pixel_values`` and ``labels``. 8-bit images
    are normalised by the builder's engine, on the device; images that a ``data_collator`` has made
    floats are taken as they are.

    Args:
        model: Maps ``[n, C, H, W]`` to what the builder's ``logits_getter`` takes logits from.
        args: With ``remove_unused_columns=False``, since `Trainer` would remove the images.
        method: The builder of any method; it is moved to the device.
        mixmatch: The same, in its place.
        criterion: The method's loss; its ramp counts micro-batches.
        train_dataset: Labelled samples, for instance a ``datasets.Dataset``.
        unlabelled_dataset: Unlabelled samples, likewise; labels are not read.
        ratio: Unlabelled images per labelled one. FixMatch's μ is 7.
        guess_first: Whether guesses are made before the batch, by a pass of their own; False leaves
            them to the loss, where the method can. None is the order of the method's reference.
        image: Name of the image in samples that are dicts.
        label: Name of the label in samples that are dicts.
        data_collator: Of evaluation; None stacks images and labels with `collate`.
        options: Further arguments of `Trainer`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is one that `Trainer` would use and this class cannot.
    """

    loss_is_scaled_for_ga = False  # a mean per micro-batch: Trainer divides by their number

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        *,
        method: BatchBuilder | None = None,
        mixmatch: MixMatch | None = None,
        criterion: nn.Module,
        train_dataset: Any = None,
        unlabelled_dataset: Any = None,
        ratio: int = 1,
        guess_first: bool | None = None,
        image: str = "image",
        label: str = "label",
        data_collator: Any = None,
        **options: Any,
    ) -> None:
        check_kind("args", args, TrainingArguments, "TrainingArguments")
        method = _method(method, mixmatch)
        check_criterion(criterion)
        guess_first = as_guess_first(guess_first, method)
        image, label = as_text("image", image), as_text("label", label)
        ratio = as_integer("ratio", ratio, least=1, most=MOST_IMAGES)
        _check_arguments(args, options, method)
        super().__init__(
            model,
            args,
            data_collator=data_collator or _EvaluationCollator(image, label),
            train_dataset=train_dataset,
            **options,
        )
        self.method = method.to(args.device)
        self.criterion = criterion
        self.guess_first = guess_first
        self.unlabelled_dataset = unlabelled_dataset
        self.ratio = ratio
        self.image = image
        self.label = label
        # of the losses since they were last logged
        self._sums: dict[str, Tensor] = {}
        self._num_batches = 0

    @property
    def mixmatch(self) -> BatchBuilder:
        """The builder, `method`."""
        return self.method

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the steps of both training sets as one `DataLoader`; see `SemiSupervisedLoader`.

        It is not prepared by Accelerate, which would shard it once more.
        """
        for name in ("train_dataset", "unlabelled_dataset"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be a data set to train with, got None")
        args = self.args
        loader = SemiSupervisedLoader(
            self.train_dataset,
            self.unlabelled_dataset,
            self._train_batch_size,
            ratio=self.ratio,
            image=self.image,
            label=self.label,
            seed=args.seed if args.data_seed is None else args.data_seed,
            device=args.device,
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return _StepLoader(loader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Build the batch of this step and return its loss; in evaluation, that of the model."""
        if "step" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.method.step.fill_(inputs["step"])
        ids_u = None if isinstance(self.method, MixMatch) else inputs["ids_u"]
        guesser = model if self.guess_first else None
        batch = build(self.method, inputs["x"], inputs["y"], inputs["u"], guesser, ids_u)
        outputs = model(batch.inputs)
        losses = self.criterion(self.method.for_loss(outputs), batch)
        # not one tensor, since weight_u is on the CPU
        for name, value in losses._asdict().items():
            if name != "loss":
                value = value.detach()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_batches += 1
        return (losses.loss, outputs) if return_outputs else losses.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Normalise 8-bit images on the device, then predict as `Trainer` does."""
        images = inputs.get("pixel_values")
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            engine = next(iter(self.method.engines.values()))
            normalize = complete(engine).normalize
            if normalize is None:
                raise ValueError(
                    "pixel_values must be normalised by a data_collator of yours, since "
                    f"{engine!r} has no normalize, got uint8"
                )
            inputs = {**inputs, "pixel_values": normalize(images.to(self.args.device))}
        step: tuple[Tensor | None, Tensor | None, Tensor | None] = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        return step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; add the means of the loss's parts where a training loss is logged."""
        if "loss" in logs and self._num_batches > 0:
            totals = torch.tensor(list(map(float, self._sums.values())), device=self.args.device)
            means = self.accelerator.reduce(totals / self._num_batches, "mean")
            logs.update(zip(self._sums, means.tolist(), strict=True))
            self._sums, self._num_batches = {}, 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and what the builder has learnt of guesses beside it."""
        learnt = self._learnt()
        if learnt and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or "")
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(learnt, folder / _LEARNT)
        super().save_model(output_dir, _internal_call)

    # where Trainer has found out which checkpoint it resumes
    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        mine = self._learnt()
        if not mine:
            return
        path = Path(resume_from_checkpoint, _LEARNT)
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint must hold {_LEARNT}, what {type(self.method).__name__} "
                f"has learnt of guesses, got {str(path.parent)!r} without it"
            )
        learnt = torch.load(path, map_location="cpu", weights_only=True)
        self.method.load_state_dict({**self.method.state_dict(), **learnt})

    def _learnt(self) -> dict[str, Tensor]:
        """What the builder's state holds beside its seed and step."""
        state = self.method.state_dict()
        return {name: value for name, value in state.items() if name not in ("seed", "step")}


def _method(method: Any, mixmatch: Any) -> BatchBuilder:
    """Return the builder, by whichever name it was given."""
    if method is not None and mixmatch is not None:
        raise ValueError("method or mixmatch must be given, and not both")
    if method is None:
        check_kind("mixmatch", mixmatch, MixMatch, "a MixMatch, or method another method's builder")
        return mixmatch  # type: ignore[no-any-return]
    check_kind("method", method, BatchBuilder, "a builder such as FixMatch")
    return method  # type: ignore[no-any-return]


def _check_arguments(
    args: TrainingArguments, options: Mapping[str, Any], method: BatchBuilder
) -> None:
    if args.remove_unused_columns:
        raise ValueError(
            "args.remove_unused_columns must be False, since Trainer would remove the column of "
            "the images, which the model has no argument for, got True: pass "
            "TrainingArguments(remove_unused_columns=False)"
        )
    if args.ignore_data_skip:
        raise ValueError(
            "args.ignore_data_skip must be False, since a resumed run would repeat batches and "
            "their draws, got True: nothing is fetched here to be skipped"
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            "args.label_smoothing_factor must be 0, got "
            f"{args.label_smoothing_factor}: pass {type(method).__name__}(label_smoothing=...)"
        )
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func must be None, since criterion is the loss")


class _EvaluationCollator:
    """Stack images, unchanged, and labels, under the names that models take."""

    def __init__(self, image: str, label: str) -> None:
        self.image = image
        self.label = label

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        fields = collate(samples)
        if not isinstance(fields, Mapping) or self.image not in fields:
            came = list(fields) if isinstance(fields, Mapping) else type(samples[0]).__name__
            raise ValueError(
                f"samples to evaluate must be dicts with a field {self.image!r}, got {came}: say "
                'which it is with image="..."'
            )
        batch = {"pixel_values": fields[self.image]}
        return {**batch, "labels": fields[self.label]} if self.label in fields else batch


class _StepLoader(DataLoader[Any]):
    """A loader's steps as a `DataLoader`, whose first ones Trainer can skip.

    At resumption Trainer leaves out batches of the batch sampler. Here these are numbers of steps,
    and the loader goes to the step that it is asked for.
    """

    def __init__(self, loader: SemiSupervisedLoader) -> None:
        super().__init__(
            _Steps(loader), batch_sampler=_StepNumbers(len(loader)), collate_fn=_only_one
        )

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Trainer calls this before each."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _StepNumbers(Sampler[list[int]]):
    """The numbers of the steps of an epoch, each in a list of its own."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.steps_per_epoch
        return ([step] for step in range(first, first + self.steps_per_epoch))

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; where steps are skipped, Trainer calls this and not the loader's."""
        self.epoch = epoch


class _Steps(Dataset[dict[str, Any]]):
    """A loader's batches by their numbers; consecutive ones are fetched ahead."""

    def __init__(self, loader: SemiSupervisedLoader) -> None:
        self.loader = loader
        self.batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        order = self.loader.order  # labelled images in an epoch, as Trainer counts examples
        return order.steps_per_epoch * order.batch_size * order.world_size

    def __getitem__(self, step: int) -> dict[str, Any]:
        state = self.loader.state_dict()
        if state["step"] != step or step % len(self.loader) == 0:
            self.loader.load_state_dict({**state, "step": step})
            self.batches = iter(self.loader)
        batch = next(self.batches)
        # an array, which Trainer leaves where it is
        ids_u = batch.ids_u.numpy()
        return {"x": batch.x, "y": batch.y, "u": batch.u, "ids_u": ids_u, "step": step}


def _only_one(samples: Sequence[Any]) -> Any:
    return samples[0]
