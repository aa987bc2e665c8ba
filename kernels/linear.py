"""Dense products with a weight that stays the same for the life of the engine.

Semantics: `linear(x, w, b) = x w^T + b`.

Shapes: x `[num_tokens, in_features]`, w `[out_features, in_features]`, b `[out_features]`.

On a CPU the product goes through oneDNN, which for float32 is two to three times as fast as torch's default BLAS on
processors where that one does not use AVX-512 (measured: 32 tokens, 4096 x 768, two cores: 0.58 ms packed, 0.87 ms
unpacked, 2.1 ms by default). Its packed products also give a row the same bits whatever the other rows are, so that
an answer does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Rows that the packed layout is chosen for; the layout for 8 and more rows serves a single row as well.
_PACKING_ROWS = 32
# Rows from which `product` is faster with a kernel made for its shape, even if it is the first of that shape.
_MIN_COMPILED_ROWS = 128
_PACKED_DTYPES = (torch.float32, torch.bfloat16)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "mkldnn::_linear_pointwise", "CPU"
    )


_ONEDNN = _has_onednn()


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in the layout that `linear` is fastest with; only `linear` can read it.

    On a CPU this is a copy, so the caller should drop the original; elsewhere it is the tensor itself.
    """
    if weight.device.type != "cpu" or not _ONEDNN or weight.dtype not in _PACKED_DTYPES:
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight, _PACKING_ROWS)
    return packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x weight^T + bias` for a weight as it is or packed by `pack_weight`."""
    if _uses_onednn(x):
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return product
    return functional.linear(x, weight, bias)


def linear_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` without a bias, written to `out`, which is returned and has as many rows as x."""
    assert len(out) == len(x), f"room for {len(out)} of {len(x)} rows"  # torch would make another `out`
    if _uses_onednn(x):
        return out.copy_(linear(x, weight))
    return torch.mm(x, weight.t(), out=out)


def _uses_onednn(x: torch.Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype in _PACKED_DTYPES


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x weight^T` for a weight that was put together for this step alone."""
    # oneDNN compiles a kernel for each new shape (0.5 ms): few rows are done before that.
    if x.shape[0] >= _MIN_COMPILED_ROWS:
        return linear(x, weight)
    return torch.mm(x, weight.t())
