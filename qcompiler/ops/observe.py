"""`qcompiler::observe`: marks a value whose range is to be measured. The identity, in every backend.

It stands in a graph between `place_observers` and `calibrate_ranges` and is never exported: the verifier refuses it from the
end of that stage on.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("qcompiler", "FRAGMENT")
# The result is the argument itself: observing copies nothing.
_library.define("observe(Tensor(a) x, str name, str kind) -> Tensor(a)")
_library.impl("observe", lambda x, name, kind: x, "CompositeExplicitAutograd")
_library.impl("observe", torch.library.fallthrough_kernel, "Autograd")  # the argument has its own gradient
torch.library.register_fake("qcompiler::observe", lambda x, name, kind: x, lib=_library)

OBSERVE = torch.ops.qcompiler.observe.default
