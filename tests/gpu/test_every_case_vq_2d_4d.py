"""Every case of `linear_vq` with vectors of two and four (`tests/gpu/every_case.py`)."""

from tests.gpu.every_case import (  # noqa: F401
    parts,
    test_every_case_as_the_shipped_table_runs_it,
    test_every_case_on_every_kernel,
    test_every_kernel_of_the_format,
)

PARTS = [part for part in parts("linear_vq") if not part.format.startswith("vq1d")]
