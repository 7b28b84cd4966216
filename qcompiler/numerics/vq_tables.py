"""Fixed codebooks: the 16 values of NF4 and FP4, and any table as int8 entries with a float16 scale."""

from __future__ import annotations

import torch

# As bitsandbytes has them. NF4: quantiles of a normal distribution, 0 and both ends exact ("QLoRA", arXiv 2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: sign, two bits of exponent, one of mantissa, with the subnormal 1/192; in the order of the code's bits.
FP4 = tuple(
    sign * value for sign in (1.0, -1.0) for value in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
)  # fmt: skip
TABLES = {"nf4": NF4, "fp4": FP4}

CANDIDATES = 2048  # float16 scales between max / 128 and twice that are some 1000


def entries(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 entries `[K, d]` and the float16 scale c that represent `table` best: Σ (table − c · entries)² is least.

    Raises:
        ValueError: NaN or infinite entries, or a table of zeros.
    """
    values = table.double()
    low, high = values.min(), values.max()
    if not torch.isfinite(values).all() or not values.any():
        raise ValueError("a table needs finite entries that are not all 0")
    smallest = max((high / 127).item(), (-low / 128).item())
    scales = torch.linspace(1, 2, CANDIDATES, dtype=torch.float64, device=table.device).mul_(smallest).half().unique()
    scales = scales[(high / scales.double() < 127.5) & (low / scales.double() > -128.5) & torch.isfinite(scales) & (scales > 0)]
    if not len(scales):
        raise ValueError(f"a table with entries from {low:.3g} to {high:.3g} has no float16 scale")
    tried = scales.double().view(-1, *[1] * values.dim())
    codes = (values / tried).round().clamp(-128, 127)
    best = (codes * tried - values).square().flatten(1).sum(1).argmin()
    return codes[best].to(torch.int8), scales[best]
