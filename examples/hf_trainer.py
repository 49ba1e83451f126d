"""MixMatch in Hugging Face's Trainer: a ResNet of transformers, two training sets."""

import tempfile

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.integrations.transformers import MixMatchTrainer

STEPS = 250
digits = load_dataset("digits")
labelled, unlabelled = digits.split(num_labels=40, seed=0)


def samples(images, labels=None):
    """Dicts, as a datasets.Dataset has them; 16 px, of which the ResNet's stem leaves 4."""
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if labels is None:
        return [{"image": image} for image in large]
    return [{"image": x, "label": y} for x, y in zip(large, labels, strict=True)]


def error_rate(prediction):
    return {"error": 100 * np.mean(prediction.predictions.argmax(-1) != prediction.label_ids)}


torch.manual_seed(0)
sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
config = ResNetConfig(num_channels=1, num_labels=digits.num_classes, **sizes)
with tempfile.TemporaryDirectory() as folder:
    trainer = MixMatchTrainer(
        ResNetForImageClassification(config),
        TrainingArguments(
            folder,
            remove_unused_columns=False,  # Trainer would drop the images
            max_steps=STEPS,
            per_device_train_batch_size=32,
            learning_rate=4e-3,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
        ),
        mixmatch=MixMatch(
            WeakAugment(padding=2, padding_mode="zeros", flip=0.0),
            digits.num_classes,
            logits_getter=lambda output: output.logits,
        ),
        criterion=MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2),
        train_dataset=samples(*labelled.tensors),
        unlabelled_dataset=samples(*unlabelled.tensors),
        eval_dataset=samples(digits.test_images, digits.test_labels),
        compute_metrics=error_rate,
    )
    trainer.train()
    print(f"test error {trainer.evaluate()['eval_error']:.1f} %")
