"""Every case of `linear_experts_nbit`, `linear_mixed` and `embedding_nbit` (`tests/gpu/every_case.py`)."""

from tests.gpu.every_case import (  # noqa: F401
    parts,
    test_every_case_as_the_shipped_table_runs_it,
    test_every_case_on_every_kernel,
    test_every_kernel_of_the_format,
)

PARTS = parts("linear_experts_nbit", "linear_mixed", "embedding_nbit")
