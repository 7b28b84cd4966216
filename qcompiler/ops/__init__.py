"""Op declarations. Importing this package fills `SPECS`; it needs numpy alone."""

from qcompiler.ops.embedding_nbit import EMBEDDING_NBIT
from qcompiler.ops.embedding_vq import EMBEDDING_VQ
from qcompiler.ops.linear_experts_nbit import LINEAR_EXPERTS_NBIT
from qcompiler.ops.linear_mixed import LINEAR_MIXED
from qcompiler.ops.linear_nbit import LINEAR_NBIT
from qcompiler.ops.linear_vq import LINEAR_VQ
from qcompiler.ops.spec import SPECS

__all__ = [
    "EMBEDDING_NBIT",
    "EMBEDDING_VQ",
    "LINEAR_EXPERTS_NBIT",
    "LINEAR_MIXED",
    "LINEAR_NBIT",
    "LINEAR_VQ",
    "SPECS",
]
