"""MixMatch in Lightning: a mixin, and two attributes that the module sets."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from gpu_mixmatch import MixMatch, MixMatchLoss, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.integrations.lightning import MixMatchMixin
from gpu_mixmatch.recipes.models import build_model

STEPS = 250
digits = load_dataset("digits")


class Classifier(MixMatchMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model("cnn", digits.num_classes, in_channels=1)
        self.mixmatch = MixMatch(WeakAugment.digits(), digits.num_classes, seed=0)
        self.criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)

    def forward(self, images):
        return self.model(images)

    def train_dataloader(self):  # made here, each process takes its own share
        labelled, unlabelled = digits.split(num_labels=40, seed=0)
        return SemiSupervisedLoader(labelled, unlabelled, 32, steps_per_epoch=STEPS)

    def test_step(self, batch, batch_idx):
        x, y = batch
        logits = self(self.mixmatch.augment.normalize(x))
        self.log("error", 100 * (logits.argmax(dim=1) != y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


L.seed_everything(0)
trainer = L.Trainer(
    max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
module = Classifier()
trainer.fit(module)
test = DataLoader(TensorDataset(digits.test_images, digits.test_labels), batch_size=500)
(results,) = trainer.test(module, test, verbose=False)
print(f"test error {results['error']:.1f} %")
