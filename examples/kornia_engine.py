"""Views by Kornia: rotation, shear and shift, of which WeakAugment has the shift alone."""

import kornia.augmentation as K
import torch

from gpu_mixmatch import KorniaAugment, MixMatch, MixMatchLoss, SemiSupervisedLoader
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import build_model

STEPS = 250
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

digits = load_dataset("digits")  # uint8 images of 8 x 8 pixels, from scikit-learn
labelled, unlabelled = digits.split(num_labels=40, seed=0)
loader = SemiSupervisedLoader(labelled, unlabelled, 32, steps_per_epoch=STEPS, device=device)

model = build_model("cnn", digits.num_classes, in_channels=1).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)

views = K.AugmentationSequential(K.RandomAffine(10.0, translate=(0.1, 0.1), shear=5.0, p=1.0))
engine = KorniaAugment(views, mean=0.5, std=0.5)  # any Kornia module; normalised afterwards
mixmatch = MixMatch(engine, digits.num_classes, seed=0).to(device)
criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)

for x, y, u, _, ids_u in loader:
    batch = mixmatch(x, y, u, model, ids_u=ids_u)
    loss = criterion(model(batch.inputs), batch).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    logits = model(engine.normalize(digits.test_images.to(device)))
wrong = logits.argmax(dim=1).cpu() != digits.test_labels
print(f"test error {100 * wrong.float().mean():.1f} %")
