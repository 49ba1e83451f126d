"""FixMatch in a plain PyTorch loop: handwritten digits, 40 labels, seven images without per label.

Another method is another builder and its loss. With `fixmatch(x, y, u, model, ids_u=ids_u)` the
guess is made first, by a pass of its own.
"""

import torch

from gpu_mixmatch import ConsistencyLoss, FixMatch, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.choices import make_strong
from gpu_mixmatch.recipes.models import build_model

STEPS = 300
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

digits = load_dataset("digits")  # uint8 images of 8 x 8 pixels, from scikit-learn
labelled, unlabelled = digits.split(num_labels=40, seed=0)
loader = SemiSupervisedLoader(
    labelled, unlabelled, 16, ratio=7, steps_per_epoch=STEPS, device=device
)

model = build_model("cnn", digits.num_classes, in_channels=1).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)

weak = WeakAugment.digits()
strong = make_strong(weak, 8, 8)  # RandAugment.fixmatch(weak), for images smaller than its 32 px
fixmatch = FixMatch(weak, strong, digits.num_classes, threshold=0.8, seed=0).to(device)
criterion = ConsistencyLoss(lambda_u=1.0)

for x, y, u, _, ids_u in loader:
    batch = fixmatch(x, y, u, ids_u=ids_u)  # labelled, strong and weak views
    losses = criterion(model(batch.inputs), batch)  # which guesses on the weak ones
    losses.loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    logits = model(weak.normalize(digits.test_images.to(device)))
wrong = logits.argmax(dim=1).cpu() != digits.test_labels
print(f"kept {losses.kept:.0%} of the guesses, test error {100 * wrong.float().mean():.1f} %")
