"""README's code runs, and its tables equal the committed results."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.report import DOCUMENTS, ROOT, rendered
from tests.image_files import write_folder

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _stand_ins() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    return {
        "device": "cpu",
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "labelled": [(images(4), torch.tensor([1, 2, 3, 4])) for _ in range(2)],
        "unlabelled": [images(6) for _ in range(2)],
        "labelled_set": TensorDataset(images(20), torch.arange(20) % 10),
        "unlabelled_set": TensorDataset(images(64)),
        "all_images": images(70),
        "all_labels": torch.arange(70) % 10,
        "split": torch.arange(20),
    }


def test_readme_has_code_to_run():
    assert len(BLOCKS) >= 9


# Lightning's own, of torch's private names
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_readme_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("labelled", "unlabelled"):
        write_folder(tmp_path / "data" / part, 3, "jpg")
    names = _stand_ins()
    for number, block in enumerate(BLOCKS):
        try:
            exec(compile(block, f"README block {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"README's block {number} raised {error!r}:\n{block}")
        if "DaliLoader(" in block:
            assert names["loader"].skipped == []
    batch = names["batch"]
    assert batch.inputs.shape == (64 + 2 * 64, 3, 32, 32)
    torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(3 * 64))


def test_readme_tables_equal_the_committed_results():
    for path in DOCUMENTS:
        text = path.read_text()
        assert rendered(text, path.parent) == text, path


def test_readme_names_the_test_command_that_ci_runs():
    assert "<!-- test command -->\n    make test\n" in README
