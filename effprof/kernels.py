"""What CUDA kernels allocate beside their results: which attention kernel runs, and its buffers.

Sources, torch 2.13: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (which kernel),
cuda/flash_attn/flash_api.cpp and cuda/attention_backward.cu (their buffers), and
aten/src/ATen/native/cuda/Embedding.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLASH_HEAD_DIM = 256  # the widest head that flash attention takes
_FLASH_FROM, _BF16_FROM = 8.0, 8.0  # compute capability
UNSORTED_INDICES = 3072  # embedding's backward sorts more indices than these
_PER_SEGMENT = 10  # NROWS_PER_THREAD


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: ``rows`` × ``seq_len`` queries of ``heads`` (``kv_heads`` keys)."""

    rows: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int  # of what the kernel reads
    masked: bool

    def kernel(self, capability: float | None, *, bf16: bool) -> str:
        """flash, efficient or math: the first of torch's order that takes these inputs.

        cuDNN's, which torch prefers on Hopper, keeps what flash keeps. ``capability`` None is an
        Ampere-class card.
        """
        capable = _FLASH_FROM if capability is None else capability
        half = self.itemsize == 2
        fits = self.head_dim <= _FLASH_HEAD_DIM
        if half and not self.masked and fits and capable >= _FLASH_FROM:
            return "flash"
        grouped = self.heads != self.kv_heads and not self.masked  # with a mask they are repeated
        aligned = self.head_dim % (8 if half else 4) == 0
        if grouped or not aligned or (half and bf16 and capable < _BF16_FROM):
            return "math"
        return "efficient"

    def log_sum_exp(self, kernel: str) -> int:
        """Numbers (fp32) of the log-sum-exp that backward needs."""
        length = _multiple(self.seq_len, 32) if kernel == "efficient" else self.seq_len
        return self.rows * self.heads * length

    def backward(self, kernel: str) -> tuple[tuple[int, str], ...]:
        """(bytes, label) of what backward holds beside the three gradients."""
        queries = self.rows * self.heads
        if kernel == "flash":
            length = _multiple(self.seq_len, 128)
            width = _multiple(self.head_dim, 32 if self.head_dim <= 128 else 64)
            found = [
                (4 * queries * length, "softmax_d"),
                (4 * queries * length * width, "dq_accum"),
            ]
            if self.heads != self.kv_heads:
                expanded = self.itemsize * queries * self.seq_len * self.head_dim
                found += [(expanded, "dk_expanded"), (expanded, "dv_expanded")]
            return tuple(found)
        # The efficient kernel: a row sum, and sums in fp32 of gradients that are not.
        sums = 12 * queries * self.seq_len * self.head_dim if self.itemsize == 2 else 0
        return ((4 * queries * self.seq_len, "delta"), (sums, "accumulators"))


def generation(capability: float | None) -> float:
    """The capability that decides which kernels run: newer cards run those of the first that has
    them all.
    """
    return _FLASH_FROM if capability is None else min(capability, _FLASH_FROM)


EMBEDDING_SCRATCH = ("sorted_indices", "radix_sort", "segments", "segment_sums")


def embedding_backward(positions: int, vocab: int, hidden: int) -> tuple[tuple[int, str], ...]:
    """(bytes, label) beside an embedding's gradient, were every token another one."""
    if positions <= UNSORTED_INDICES:
        return ()
    distinct = min(positions, vocab)
    segments = distinct + (positions - distinct) // _PER_SEGMENT
    sizes = (2 * 8 * positions, 2 * 8 * positions, 4 * 8 * positions, 4 * segments * hidden)
    return tuple(zip(sizes, EMBEDDING_SCRATCH, strict=True))


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
