"""How far results may be from float64, by dtype, for values between about -2 and 2."""

import torch

# Absolute. float32: a few roundings of 1.2e-7 each and sums of dozens of terms; the half precisions
# compute in float32 and round once, by half a unit in the last place at 2: 2^-10 and 2^-7.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float32: 4e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

# Of Triton's kernels. The loss is float64 for float64 logits. Triton's interpreter, which runs them
# where there is no GPU, cuts bfloat16 off instead of rounding it: by a whole unit, not by half.
KERNEL_TOLERANCES: dict[torch.dtype, float] = {
    **TOLERANCES,
    torch.float64: 1e-12,
    torch.bfloat16: 8e-3 if torch.cuda.is_available() else 1.6e-2,
}
