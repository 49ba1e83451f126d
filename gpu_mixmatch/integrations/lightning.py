"""Any method in a Lightning module: a mixin, and a callback that writes previews and guesses."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._extras import need
from gpu_mixmatch._validation import as_integer, came
from gpu_mixmatch.data import AugmentedBatch, KeyedLoader
from gpu_mixmatch.insight import TensorBoardInsight
from gpu_mixmatch.insight.guesses import as_truth
from gpu_mixmatch.insight.preview import MOST_PREVIEWED, as_class_names
from gpu_mixmatch.integrations.steps import as_guess_first, build
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.types import SemiSupervisedBatch

__all__ = ["MixMatchMixin", "insight_callback"]

_LOADER_KEY = "mixmatch_loader"


class MixMatchMixin:
    """Train a LightningModule with any method; name it before `LightningModule` among the bases.

    The module sets ``self.mixmatch``, or ``self.method`` for another method's builder, and
    ``self.criterion``, that method's loss. Its ``forward`` maps images to logits; validation, test
    and prediction stay its own. If it defines a hook that is also defined here, it must call
    ``super()``'s.

    Example:
        >>> class Classifier(MixMatchMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = ...
        ...         self.mixmatch = MixMatch(WeakAugment.cifar10(), num_classes=10)
        ...         self.criterion = MixMatchLoss()
        ...
        ...     def forward(self, images):
        ...         return self.model(images)

    Batches come from a `SemiSupervisedLoader`, `ResidentLoader` or `DaliLoader`, or from a
    `CombinedLoader` of two DataLoaders, ``{"labelled": ..., "unlabelled": ...}`` or a list of both.
    Make loaders of ours in a ``train_dataloader`` method, of the module or of a data module: it is
    called when the process group exists, so that each rank takes its own share. Lightning leaves
    their order alone, and gives a `DistributedSampler` to the DataLoaders of a `CombinedLoader`.

    The builder is part of the module, so that a checkpoint has its seed and step, and what it has
    learnt of guesses. The step counts batches, also where gradients are accumulated. With a loader
    of ours a run resumes through ``Trainer.fit(ckpt_path=...)`` to the last bit, in mid-epoch too.
    A checkpoint holds no gradients: with accumulation, make it between two optimizer steps.

    Attributes:
        mixmatch: The builder, set by the module.
        method: The same, for methods other than MixMatch.
        criterion: The loss, set by the module.
        guess_first: Whether guesses are made before the batch, by a pass of their own; False leaves
            them to the loss, where the method can. None is the order of the method's reference.
    """

    mixmatch: MixMatch
    method: BatchBuilder
    criterion: Any
    guess_first: bool | None = None
    trainer: Any  # this and log_dict are the LightningModule's
    log_dict: Any
    _loader_state: Mapping[str, int] | None = None  # of the checkpoint that was loaded

    def __init_subclass__(cls, **options: Any) -> None:
        """Check the order of the bases, in which Lightning's own hooks would hide these.

        Raises:
            TypeError: If a LightningModule stands before this class.
        """
        super().__init_subclass__(**options)
        names = [base.__name__ for base in cls.__mro__]
        mixin = names.index("MixMatchMixin")
        if "LightningModule" in names[:mixin]:
            raise TypeError(
                f"{cls.__name__} must name MixMatchMixin before LightningModule among its bases, "
                f"got {', '.join(base.__name__ for base in cls.__bases__)}"
            )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, but leave sample ids on the CPU, where draws are made from them."""
        if isinstance(batch, SemiSupervisedBatch | AugmentedBatch):
            fields = batch._asdict().items()
            return batch._replace(
                **{
                    name: value.to(device, non_blocking=True)
                    for name, value in fields
                    if name not in ("ids_x", "ids_u")
                }
            )
        return super().transfer_batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a training batch into the method's; leave all other batches as they are."""
        if not self.trainer.training:
            return batch
        method = self._check_parts()
        model: Any = self
        # Lightning enters it for training_step alone, but the guess is a forward pass too
        with self.trainer.precision_plugin.forward_context():
            if isinstance(batch, AugmentedBatch):
                if not isinstance(method, MixMatch):
                    raise TypeError(
                        f"a training batch of {type(method).__name__} must hold images that were "
                        "not augmented, got an AugmentedBatch: make the loader with augment=None"
                    )
                return method.from_views(batch.x, batch.y, batch.views, model, ids_u=batch.ids_u)
            guesser = model if as_guess_first(self.guess_first, method) else None
            if isinstance(batch, SemiSupervisedBatch):
                return build(method, batch.x, batch.y, batch.u, guesser, batch.ids_u)
            return build(method, *_labelled_and_unlabelled(batch), guesser, None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss; log it and its parts by their names, such as loss_x and loss_u."""
        model: Any = self
        output = self.criterion(self._check_parts().for_loss(model(batch.inputs)), batch)
        self.log_dict(output._asdict(), batch_size=len(batch.inputs))
        loss: Tensor = output.loss
        return loss

    def on_train_start(self) -> None:
        """Check what the module has set and that a loader of ours has this rank's share.

        It also sets where the loader begins.

        Raises:
            TypeError: If the builder or ``criterion`` is missing.
            ValueError: If the builder must guess first and ``guess_first`` is False.
            RuntimeError: If the loader was made for another rank or number of processes.
        """
        as_guess_first(self.guess_first, self._check_parts())
        trainer, loader = self.trainer, self._keyed_loader()
        if loader is None:
            return
        order, wanted = loader.order, (trainer.global_rank, trainer.world_size)
        if (order.rank, order.world_size) != wanted:
            raise RuntimeError(
                f"the training loader must be of rank {wanted[0]} of {wanted[1]} processes, got "
                f"rank {order.rank} of {order.world_size}. Make it in train_dataloader() of the "
                "module or of a LightningDataModule: Lightning calls that once the process group "
                "stands"
            )
        if hasattr(loader, "sampler"):
            # Lightning's count of epochs is ahead by one after some resumptions
            loader.sampler.set_epoch = _keep_epoch
        before = loader.state_dict()
        if not (trainer.ckpt_path and self._loader_state):
            loader.set_epoch(trainer.current_epoch)
        elif self._loader_state != before:
            loader.load_state_dict(self._loader_state)
        if loader.state_dict() != before:
            # Lightning has its iterator already; it restores loaders in mid-epoch only
            iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_end(self) -> None:
        """Move a loader of ours on to its next epoch where ``limit_train_batches`` cut this one."""
        loader = self._keyed_loader()
        if loader is not None and self._state_of(loader) != loader.state_dict():
            loader.load_state_dict(self._state_of(loader))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the state of a loader of ours into the checkpoint; the builder's is there already."""
        loader = self._keyed_loader()
        if loader is not None:
            checkpoint[_LOADER_KEY] = self._state_of(loader)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the loader's state until the loader is there."""
        self._loader_state = checkpoint.get(_LOADER_KEY)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone, by the name that it looks for.

        What a builder has learnt is the same on all ranks, and may be of a dtype that is not sent.
        """
        names = list(self.__dict__.get("_ignored_by_ddp", ()))
        for part in ("mixmatch", "method"):
            builder = getattr(self, part, None)
            if isinstance(builder, BatchBuilder):
                names += [f"{part}.{name}" for name, _ in builder.named_buffers()]
        return names

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self.__dict__["_ignored_by_ddp"] = names

    def _check_parts(self) -> BatchBuilder:
        """Return the builder; raise a TypeError if the module has not set what it must."""
        mixmatch, method = getattr(self, "mixmatch", None), getattr(self, "method", None)
        builder = method if mixmatch is None else mixmatch
        owner = type(self).__name__
        if not isinstance(builder, BatchBuilder):
            raise TypeError(
                "self.mixmatch must be such as MixMatch(WeakAugment.cifar10(), num_classes=10), or "
                "self.method such as FixMatch(weak, RandAugment.fixmatch(weak), num_classes=10), "
                f"set in __init__ of {owner}, got {_found(builder)}"
            )
        if mixmatch is not None and isinstance(method, BatchBuilder):
            raise TypeError(
                f"self.mixmatch or self.method must be set in __init__ of {owner}, and not both, "
                f"got {type(mixmatch).__name__} and {type(method).__name__}"
            )
        criterion = getattr(self, "criterion", None)
        if not callable(criterion):
            raise TypeError(
                "self.criterion must be such as MixMatchLoss(), the method's loss, set in __init__ "
                f"of {owner}, got {_found(criterion)}"
            )
        return builder

    def _state_of(self, loader: KeyedLoader) -> dict[str, int]:
        """Return the state after the latest batch; at an epoch's end, the next epoch's."""
        state, length = loader.state_dict(), len(loader)
        if self.trainer.is_last_batch:
            state["step"] = -(-state["step"] // length) * length
        return state

    def _keyed_loader(self) -> KeyedLoader | None:
        loader = self.trainer.train_dataloader
        return loader if isinstance(loader, KeyedLoader) else None


def insight_callback(
    every_n_steps: int = 100,
    *,
    truth: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    rows: int = 4,
) -> Any:
    """Return a callback that writes previews and the quality of guesses to TensorBoard.

    It needs a `TensorBoardLogger`; see `TensorBoardInsight` for the arguments and what is written.

    Raises:
        ImportError: If lightning is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no TensorBoardLogger, or an argument is out of its range.
    """
    every_n_steps = as_integer("every_n_steps", every_n_steps, least=1)
    rows = as_integer("rows", rows, least=1, most=MOST_PREVIEWED)
    truth = None if truth is None else as_truth(truth)
    if class_names is not None:
        class_names = as_class_names(class_names)
    need("lightning.pytorch.callbacks", "the callback")
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.loggers import TensorBoardLogger

    attached: list[TensorBoardInsight] = []

    def attach(trainer: Any, module: Any) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers:
            raise ValueError(
                "Trainer(logger=...) must have a TensorBoardLogger for the insight callback, got "
                f"{[type(logger).__name__ for logger in trainer.loggers]}"
            )
        attached.append(
            TensorBoardInsight(
                module._check_parts(),
                loggers[0].experiment,  # on other ranks a dummy, which writes nothing
                every_n_steps,
                truth=truth,
                class_names=class_names,
                rows=rows,
                model=module,
            )
        )

    def detach(*_: Any) -> None:
        while attached:
            attached.pop().close()

    return LambdaCallback(on_train_start=attach, on_train_end=detach, on_exception=detach)


def _found(part: Any) -> str:
    return "nothing" if part is None else came(part)


def _keep_epoch(epoch: int) -> None:
    """Do nothing: the loader counts its epochs itself."""


def _labelled_and_unlabelled(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y and u of what a `CombinedLoader` gives."""
    if isinstance(batch, Mapping) and {"labelled", "unlabelled"} <= set(batch):
        batch = batch["labelled"], batch["unlabelled"]
    match batch:
        case [[Tensor() as x, Tensor() as y, *_], Tensor() as u] | [
            [Tensor() as x, Tensor() as y, *_],
            [Tensor() as u, *_],
        ]:
            return x, y, u
    raise TypeError(
        "a training batch must be one of gpu_mixmatch's loaders, or of a CombinedLoader of "
        '{"labelled": (images, labels), "unlabelled": images}, got '
        f"{type(batch).__name__}"
    )
