"""Settings of the whole test run."""

import torch

# the tensors are small: threads would spend their time waiting for each other
torch.set_num_threads(1)
