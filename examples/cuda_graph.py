"""The whole builder, the guess included, captured as one CUDA graph and replayed every step."""

import torch

from gpu_mixmatch import MixMatch, MixMatchLoss, ResidentLoader, WeakAugment, capture
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import build_model

if not torch.cuda.is_available():
    print("no CUDA device here: nothing to capture")
    raise SystemExit

STEPS = 250
torch.manual_seed(0)
digits = load_dataset("digits")
labelled, unlabelled = digits.split(num_labels=40, seed=0)
loader = ResidentLoader(
    *labelled.tensors, 32, unlabelled=unlabelled.tensors[0], steps_per_epoch=STEPS, device="cuda"
)
model = build_model("cnn", digits.num_classes, in_channels=1).cuda()
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
mixmatch = MixMatch(WeakAugment.digits(), digits.num_classes, seed=0).cuda()
criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)

captured = None
for x, y, u, _, ids_u in loader:
    if captured is None:  # a batch of the shapes and dtypes to come
        captured = capture(mixmatch, model, x, y, u)
        loader.gather_into(captured.inputs)  # from the next batch on there is nothing to copy
    batch = captured(x, y, u, ids_u=ids_u)  # equals mixmatch(x, y, u, model, ids_u=ids_u)
    loss = criterion(model(batch.inputs), batch).loss  # the next call overwrites the batch
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    logits = model(mixmatch.augment.normalize(digits.test_images.cuda()))
wrong = logits.argmax(dim=1).cpu() != digits.test_labels
print(f"test error {100 * wrong.float().mean():.1f} %")
