"""MixMatch under Accelerate, which needs no glue: prepare the model, move the builder."""

import torch
from accelerate import Accelerator

from gpu_mixmatch import MixMatch, MixMatchLoss, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import build_model

STEPS = 250
accelerator = Accelerator()  # before the loader, which takes its rank from it
torch.manual_seed(0)

digits = load_dataset("digits")  # uint8 images of 8 x 8 pixels, from scikit-learn
labelled, unlabelled = digits.split(num_labels=40, seed=0)
device = accelerator.device
loader = SemiSupervisedLoader(labelled, unlabelled, 32, steps_per_epoch=STEPS, device=device)

model = build_model("cnn", digits.num_classes, in_channels=1)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

mixmatch = MixMatch(WeakAugment.digits(), digits.num_classes, seed=0).to(device)
criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)
accelerator.register_for_checkpointing(mixmatch, loader)  # save_state and load_state are exact

for x, y, u, _, ids_u in loader:
    batch = mixmatch(x, y, u, model, ids_u=ids_u)
    loss = criterion(model(batch.inputs), batch).loss
    accelerator.backward(loss)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    logits = model(mixmatch.augment.normalize(digits.test_images.to(device)))
wrong = logits.argmax(dim=1).cpu() != digits.test_labels
accelerator.print(f"test error {100 * wrong.float().mean():.1f} %")
