"""The tensor operations a decoder uses, each with what it allocates, saves and allocates again in
backward.

One function per operation, named as torch names it; backward rules from torch 2.13's
derivatives.yaml and FunctionsManual.cpp. ``numel`` broadcasting is by the larger operand, which is
all these models need.
"""

from __future__ import annotations

from collections.abc import Sequence

from effprof.estimator.autograd import Graph, Rule, Storage, Value
from effprof.tape import Tape

CHUNK = "loss.chunk."  # the labels of what a chunk of the loss holds
_NOWHERE = Storage(Graph(Tape()), 0, 0)


def to(graph: Graph, x: Value, itemsize: int, label: str = "to") -> Value:
    """A cast; the value itself where the dtype is the same."""
    if x.itemsize == itemsize:
        return x
    numel, source = x.numel, x.itemsize

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(numel, source, "d_input"),)

    return graph.attach(graph.allocate(numel, itemsize, label), label, (x,), (), rule)


def _common(graph: Graph, *sizes: tuple[int, int]) -> Value | None:
    """Of (numel, itemsize) operands of several dtypes, the CPU's copies in the common one; a CUDA
    kernel reads each as it is.
    """
    widest = max(itemsize for _, itemsize in sizes)
    narrow = sum(numel for numel, itemsize in sizes if itemsize < widest)
    return graph.allocate(narrow, widest, "cast") if graph.on_cpu and narrow else None


def add(graph: Graph, a: Value, b: Value, label: str = "add") -> Value:
    """a + b: both receive the same gradient, no copy."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return gradient, Value(gradient.storage, gradient.numel, gradient.itemsize)

    cast = _common(graph, (a.numel, a.itemsize), (b.numel, b.itemsize))
    out = graph.allocate(max(a.numel, b.numel), max(a.itemsize, b.itemsize), label)
    del cast
    return graph.attach(out, label, (a, b), (), rule)


def add_in_place(graph: Graph, a: Value, b: Value) -> Value:
    """a.add_(b): no allocation forward; ``a`` must not be saved by anyone."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return gradient, Value(gradient.storage, gradient.numel, gradient.itemsize)

    return graph.attach(Value(a.storage, a.numel, a.itemsize), "add_", (a, b), (), rule)


def mul(graph: Graph, a: Value, b: Value, label: str = "mul") -> Value:
    """a × b: each needs the other for its gradient, formed at full size before any sum."""
    numel, a_needs, b_needs = max(a.numel, b.numel), a.needs_grad, b.needs_grad
    (a_numel, a_size), (b_numel, b_size) = (a.numel, a.itemsize), (b.numel, b.itemsize)

    def product(graph: Graph, gradient: Value, other: tuple[int, int], label: str) -> Value:
        cast = _common(graph, (gradient.numel, gradient.itemsize), other)
        out = graph.allocate(numel, max(gradient.itemsize, other[1]), label)
        del cast
        return out

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value | None]:
        # torch's generated backward goes by the arguments' names: other, then self.
        d_b = product(graph, gradient, (a_numel, a_size), "d_other") if b_needs else None
        d_a = product(graph, gradient, (b_numel, b_size), "d_self") if a_needs else None
        return d_a, d_b

    saved = [value for value, wanted in ((a, b_needs), (b, a_needs)) if wanted]
    cast = _common(graph, (a_numel, a_size), (b_numel, b_size))
    out = graph.allocate(numel, max(a_size, b_size), label)
    del cast
    return graph.attach(out, label, (a, b), saved, rule)


def scale(graph: Graph, x: Value, label: str = "scale") -> Value:
    """x × a number: saves nothing."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(gradient.numel, gradient.itemsize, "d_input"),)

    return graph.attach(graph.allocate(x.numel, x.itemsize, label), label, (x,), (), rule)


def shift(graph: Graph, x: Value, label: str = "add_scalar") -> Value:
    """x + a number: a new tensor forward, the same gradient backward."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (gradient,)

    return graph.attach(graph.allocate(x.numel, x.itemsize, label), label, (x,), (), rule)


def pointwise(graph: Graph, x: Value, label: str) -> Value:
    """A function that saves its input and has a fused backward: silu, gelu."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(gradient.numel, gradient.itemsize, "d_input"),)

    return graph.attach(graph.allocate(x.numel, x.itemsize, label), label, (x,), (x,), rule)


def activation(graph: Graph, x: Value, kind: str) -> Value:
    """The MLP's function: relu saves its result, silu and the gelus their input."""
    return from_result(graph, x, "act") if kind == "relu" else pointwise(graph, x, "act")


def softmax(graph: Graph, x: Value, itemsize: int = 0) -> Value:
    """Probabilities, perhaps in another dtype; CUDA's backward multiplies gradient and result into
    a tensor of its own (SoftMax.cu).
    """
    size, source, numel = itemsize or x.itemsize, x.itemsize, x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        result = graph.allocate(numel, source, "d_input")
        product = None if graph.on_cpu else graph.allocate(numel, size, "gradient_times_output")
        del product
        return (result,)

    out = graph.allocate(numel, size, "softmax")
    return graph.attach(out, "softmax", (x,), (out,), rule)


def from_result(
    graph: Graph, x: Value, label: str, itemsize: int = 0, temporaries: int = 0
) -> Value:
    """A function that saves its result: log_softmax (no temporaries), tanh.

    Rsqrt has two.
    """
    size, source = itemsize or x.itemsize, x.itemsize
    numel = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        held = [graph.allocate(numel, size, "temporary") for _ in range(temporaries)]
        result = graph.allocate(numel, source, "d_input")
        del held
        return (result,)

    out = graph.allocate(numel, size, label)
    return graph.attach(out, label, (x,), (out,), rule)


def square(graph: Graph, x: Value) -> Value:
    """x.pow(2): backward is grad × (2 × x.pow(1)), three tensors at once."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        size, numel = saved[0].itemsize, saved[0].numel
        held = [graph.allocate(numel, size, "pow"), graph.allocate(numel, size, "scaled")]
        result = graph.allocate(numel, max(size, gradient.itemsize), "d_input")
        del held
        return (result,)

    return graph.attach(graph.allocate(x.numel, x.itemsize, "pow"), "pow", (x,), (x,), rule)


def mean(graph: Graph, x: Value, length: int) -> Value:
    """The mean over the last axis of that length."""
    numel = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(numel, gradient.itemsize, "d_input"),)

    out = graph.allocate(numel // length, x.itemsize, "mean")
    return graph.attach(out, "mean", (x,), (), rule)


def half(graph: Graph, x: Value) -> Value:
    """A slice of half the last axis: a view whose backward fills a zero tensor of full size."""
    numel = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(numel, gradient.itemsize, "d_input"),)

    return graph.attach(Value(x.storage, numel // 2, x.itemsize), "slice", (x,), (), rule)


def split(graph: Graph, x: Value) -> tuple[Value, Value]:
    """Both halves of the last axis: views, whose gradients are joined in one new tensor."""
    numel = x.numel // 2

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        other = graph.allocate(numel, gradient.itemsize, "d_half")  # summed into the first so far
        joined = graph.allocate(2 * numel, gradient.itemsize, "d_input")
        del other
        return (joined,)

    first = graph.attach(Value(x.storage, numel, x.itemsize), "split", (x,), (), rule)
    second = Value(x.storage, numel, x.itemsize)
    second.needs_grad, second.node = first.needs_grad, first.node
    return first, second


def concatenate(graph: Graph, a: Value, b: Value) -> Value:
    """cat of two halves: backward are views of the gradient."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return tuple(Value(gradient.storage, part, gradient.itemsize) for part in sizes)

    sizes = (a.numel, b.numel)
    out = graph.allocate(sum(sizes), a.itemsize, "cat")
    return graph.attach(out, "cat", (a, b), (), rule)


def copy(graph: Graph, x: Value, numel: int, label: str) -> Value:
    """A materialised copy, perhaps repeated; backward sums what was repeated."""
    source = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        if source == gradient.numel:
            return (gradient,)
        return (graph.allocate(source, gradient.itemsize, "d_input"),)

    return graph.attach(graph.allocate(numel, x.itemsize, label), label, (x,), (), rule)


def matmul(
    graph: Graph, a: Value, b: Value, numel: int, label: str, *, biased: bool = False
) -> Value:
    """A product with ``numel`` results; each side saved for the other's gradient.

    mm's backward forms mat2's gradient before self's, addmm's (``biased``) mat1's before mat2's.
    """
    a_needs, b_needs, sizes = a.needs_grad, b.needs_grad, (a.numel, b.numel)

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value | None]:
        d_a = d_b = None
        if a_needs and biased:
            d_a = graph.allocate(sizes[0], gradient.itemsize, "d_self")
        if b_needs:
            d_b = graph.allocate(sizes[1], gradient.itemsize, "d_other")
        if a_needs and not biased:
            d_a = graph.allocate(sizes[0], gradient.itemsize, "d_self")
        for made in (d_a, d_b):
            if made is not None:
                made.viewed = True  # reshaped to rows × positions, or transposed
        return d_a, d_b

    saved = [value for value, wanted in ((a, b_needs), (b, a_needs)) if wanted]
    return late(graph, numel, a.itemsize, label, (a, b), saved, rule)


def heads(graph: Graph, x: Value) -> Value:
    """positions × width seen by heads: backward copies, for the summed gradient lies by heads."""

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(gradient.numel, gradient.itemsize, "contiguous"),)

    return graph.attach(Value(x.storage, x.numel, x.itemsize), "heads", (x,), (), rule)


def late(
    graph: Graph,
    numel: int,
    itemsize: int,
    label: str,
    inputs: Sequence[Value],
    saved: Sequence[Value],
    rule: Rule,
) -> Value:
    """A result allocated after its inputs are saved, as torch does it: recomputing stops before it
    where these were the last to save.
    """
    out = Value(_NOWHERE, numel, itemsize)
    graph.attach(out, label, inputs, saved, rule)
    out.storage = graph.allocate(numel, itemsize, label).storage
    return out


def embedding(
    graph: Graph, weight: Value, ids: Value, hidden: int, scratch: Sequence[tuple[int, str]]
) -> Value:
    """Rows of the embedding; backward is a dense gradient of the whole table, and ``scratch`` what
    its kernel holds beside it.
    """
    numel, itemsize = weight.numel, weight.itemsize

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        made = graph.allocate(numel, itemsize, "d_weight")
        held = [graph.allocate(size, 1, label) for size, label in scratch]
        del held
        return (made,)

    out = graph.allocate(ids.numel * hidden, itemsize, "embedding")
    return graph.attach(out, "embedding", (weight,), (ids,), rule)


def chunked_cross_entropy(
    graph: Graph,
    hidden: Value,
    head: Value,
    shifted: Value,
    vocab: int,
    rows: int,
) -> Value:
    """trainer/loss.py: loss and both gradients in forward, ``rows`` positions' logits at a time.

    The gradients wait for backward, which hands them on.
    """
    compute = hidden.itemsize
    wanted = graph.recording and (hidden.needs_grad or head.needs_grad)
    held: list[Value | None] = [None, None]
    if wanted and hidden.needs_grad:
        held[0] = graph.allocate(hidden.numel, compute, "d_hidden", "activations")
    if wanted and head.needs_grad:
        held[1] = graph.allocate(head.numel, head.itemsize, "d_head", "activations")
    weight = head
    if head.itemsize != compute:
        weight = graph.allocate(head.numel, compute, "head_cast")
    total = graph.allocate(1, 4, "loss", "activations")
    positions, outer = shifted.numel, graph.module
    graph.module = CHUNK
    for start in range(0, positions, rows):
        _chunk(graph, min(rows, positions - start), vocab, weight, held[1])
    graph.module = outer
    del weight

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value | None]:
        given, held[:] = held[:], [None, None]
        return given

    return graph.attach(total, "chunked_loss", (hidden, head), (), rule)


def _chunk(graph: Graph, count: int, vocab: int, weight: Value, d_head: Value | None) -> None:
    """Logits in the compute dtype, in fp32, and their gradient."""
    size = weight.itemsize
    logits = graph.allocate(count * vocab, size, "logits")
    if size != 4:
        logits = graph.allocate(count * vocab, 4, "logits_fp32")
    per_row = graph.allocate(count, 8 + 4 * 4, "per_row")
    del per_row
    if size != 4:
        logits = graph.allocate(count * vocab, size, "d_logits")
    if d_head is not None and d_head.itemsize != size:
        product = graph.allocate(weight.numel, size, "d_head_chunk")
        cast = _common(graph, (weight.numel, size), (d_head.numel, d_head.itemsize))
        del product, cast
    del logits


def cross_entropy(graph: Graph, logits: Value, targets: Value) -> Value:
    """log_softmax over fp32 logits, then nll_loss, whose backward fills a tensor of the logits'
    size.
    """
    probabilities = from_result(graph, logits, "log_softmax")
    total = graph.allocate(1, 4, "total_weight")

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(saved[0].numel, saved[0].itemsize, "d_log_softmax"),)

    out = graph.allocate(1, 4, "loss", "activations")
    return graph.attach(out, "nll_loss", (probabilities,), (probabilities, targets, total), rule)
