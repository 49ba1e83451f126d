"""MixMatch on a folder of image files: labelled/CLASS/, unlabelled/ and test/CLASS/.

Set ROOT to a folder of your own. Here it is a temporary one, filled with digits as JPEG files.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image

from gpu_mixmatch import MixMatch, MixMatchLoss, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import build_model

STEPS, SIZE = 250, 8


def write(images, folders):
    for number, (image, folder) in enumerate(zip(images, folders, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{number:04d}.jpg", quality=95)


temporary = tempfile.TemporaryDirectory()
ROOT = Path(temporary.name)
digits = load_dataset("digits")
x, y = digits.split(num_labels=40, seed=0)[0].tensors
write(x, [ROOT / "labelled" / f"digit {label}" for label in y])
write(digits.train_images, [ROOT / "unlabelled"] * len(digits.train_images))
write(digits.test_images, [ROOT / "test" / f"digit {label}" for label in digits.test_labels])

torch.manual_seed(0)
data = load_dataset("folder", ROOT, size=SIZE)  # the largest centred square, brought to this size
labelled, unlabelled = data.split(None, seed=0)  # None: all labels that there are
loader = SemiSupervisedLoader(labelled, unlabelled, 32, steps_per_epoch=STEPS)
model = build_model("cnn", data.num_classes, in_channels=3)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
mixmatch = MixMatch(WeakAugment.digits(), data.num_classes, seed=0)
criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)
for x, y, u, _, ids_u in loader:
    batch = mixmatch(x, y, u, model, ids_u=ids_u)
    criterion(model(batch.inputs), batch).loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    guesses = model(mixmatch.augment.normalize(data.test_images)).argmax(dim=1)
error = 100 * (guesses != data.test_labels).float().mean()
print(f"{len(labelled)} labelled and {len(unlabelled)} unlabelled files, test error {error:.1f} %")
