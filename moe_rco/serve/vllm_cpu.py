"""The experts of a layer on a CPU: their packed tensors in the kernels' layout, and the operator that chooses among
them and runs them.

One operator does both because for one token of a small model calling three costs more than the work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import numba
import torch
from numba.np.ufunc.parallel import _launch_threads
from torch import Tensor, nn
from torch.nn import functional as F

from moe_rco.quant.packing import PACKED, SCALE, WEIGHT, ZERO_POINT
from moe_rco.serve import vllm_cpu_kernel as kernel
from moe_rco.serve.vllm_compat import direct_register_custom_op
from moe_rco.serve.vllm_shard import unpack_words
from moe_rco.types import Option

# Multiply-adds of one call below which waking other threads costs more than it saves.
PARALLEL_WORK = 1 << 20

_library = torch.library.Library("moe_rco", "FRAGMENT")


class CpuExperts(nn.Module):
    """The packed experts of one layer in three flat buffers, which together are as large as on disk.

    options: of every expert of the layer, by id. local: the ids of those this process holds; the others add nothing
    to the output. A token uses the `top_k` best of those not pruned, weighted by the softmax over them all or, where
    `renormalize`, over the chosen ones.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    table: Tensor

    def __init__(
        self,
        options: Sequence[Option],
        local: Collection[int],
        hidden: int,
        intermediate: int,
        top_k: int,
        renormalize: bool,
    ) -> None:
        super().__init__()
        self.options, self.hidden, self.intermediate = options, hidden, intermediate
        self.top_k, self.renormalize = top_k, renormalize
        table = torch.zeros(len(options), kernel.TABLE_COLUMNS, dtype=torch.int64)
        sizes = [0, 0, 0]
        for expert, option in enumerate(options):
            table[expert, kernel.PRUNED] = int(option.is_prune)
            if expert not in local:
                continue
            table[expert, kernel.BITS] = option.bits
            table[expert, kernel.GROUP] = option.group_size or 0
            table[expert, kernel.ASYMMETRIC] = int(option.is_quantized and not option.symmetric)
            for matrix in range(3):
                needed = self._sizes(matrix, option)
                for buffer, column in enumerate((kernel.WORDS, kernel.SCALES, kernel.ZEROS)):
                    table[expert, column + matrix] = sizes[buffer]
                    sizes[buffer] += needed[buffer]
        # Integers, so that no conversion of the model's dtype touches them.
        for name, size, dtype in zip(
            ("words", "scales", "zeros"), sizes, (torch.int32, torch.int16, torch.int32), strict=True
        ):
            self.register_parameter(
                name, nn.Parameter(torch.zeros(size, dtype=dtype, device="cpu"), requires_grad=False)
            )
        self.register_buffer("table", table.to("cpu"), persistent=False)

    def _shape(self, matrix: int) -> tuple[int, int]:
        """(output, input) of gate, up or down."""
        return (self.hidden, self.intermediate) if matrix == 2 else (self.intermediate, self.hidden)

    def _sizes(self, matrix: int, option: Option) -> tuple[int, int, int]:
        """Elements of words, scales and zeros."""
        rows, columns = self._shape(matrix)
        padded = -(-rows // kernel.LANES) * kernel.LANES
        per_word = 32 // option.bits
        words = padded * -(-columns // per_word)
        if not option.is_quantized:
            return words, 0, 0
        groups = columns // (option.group_size or columns)
        zeros = 0 if option.symmetric else padded // kernel.LANES * groups * option.bits
        return words, padded * groups, zeros

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.words, self.scales, self.zeros))

    def load(self, expert: int, matrix: int, suffix: str, tensor: Tensor) -> None:
        """Put one tensor as written (of this process's share of the rows and columns) in its place."""
        if suffix == ZERO_POINT:
            rows, bits = self._shape(matrix)[0], self.options[expert].bits
            target, column, flat = self.zeros, kernel.ZEROS, _planes(tensor, bits, rows)
        elif suffix == SCALE:
            target, column, flat = self.scales, kernel.SCALES, _blocked(tensor.view(torch.int16))
        elif suffix == PACKED:
            target, column, flat = self.words, kernel.WORDS, _blocked(tensor)
        elif suffix == WEIGHT:
            even = F.pad(tensor, (0, tensor.shape[1] % 2)).contiguous()
            target, column, flat = self.words, kernel.WORDS, _blocked(even.view(torch.int32))
        else:
            raise ValueError(f"{suffix} is no tensor of an expert's matrix")
        begin = int(self.table[expert, column + matrix])
        target.data[begin : begin + flat.numel()] = flat

    def prepare(self) -> None:
        """Compile the kernels (a file cache keeps them), so that no request waits for it."""
        x, logits = torch.zeros(0, self.hidden), torch.zeros(0, len(self.options))
        for threads in {1, _threads()}:
            _run(x, logits, *self._arguments, threads)

    @property
    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, bool]:
        return (
            self.words,
            self.scales,
            self.zeros,
            self.table,
            self.intermediate,
            self.top_k,
            self.renormalize,
        )

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, H] and the router's logits [T, E] -> [T, H], in x's dtype."""
        return torch.ops.moe_rco.cpu_experts(x, logits, *self._arguments)


def _blocked(tensor: Tensor) -> Tensor:
    """[R, n] -> [R / 32, n, 32], rows padded with zeros; flat."""
    rows, length = tensor.shape
    if missing := -rows % kernel.LANES:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, length)])
    return tensor.view(-1, kernel.LANES, length).transpose(1, 2).flatten()


def _planes(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Zero points packed along the rows, int32 [words, G], as bits of 32 rows: [R / 32, G, bits], flat."""
    codes = F.pad(unpack_words(packed.T, bits)[:, :rows], (0, -rows % kernel.LANES))
    lanes = torch.arange(kernel.LANES)
    planes = (codes.unflatten(1, (-1, 1, kernel.LANES)) >> torch.arange(bits).unsqueeze(1)) & 1
    return (planes << lanes).sum(-1).to(torch.int32).transpose(0, 1).flatten()


def _cpu_experts(
    x: Tensor,
    logits: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    table: Tensor,
    intermediate: int,
    top_k: int,
    renormalize: bool,
) -> Tensor:
    work = len(x) * top_k * x.shape[1] * intermediate
    threads = _threads() if work >= PARALLEL_WORK else 1
    return _run(x, logits, words, scales, zeros, table, intermediate, top_k, renormalize, threads)


def _run(
    x: Tensor,
    logits: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    table: Tensor,
    intermediate: int,
    top_k: int,
    renormalize: bool,
    threads: int,
) -> Tensor:
    inputs, scores = _readable(x), _readable(logits)
    out = torch.empty_like(inputs)
    (kernel.run_experts_parallel if threads > 1 else kernel.run_experts)(
        inputs.data_ptr(),
        inputs.itemsize * 8,
        scores.data_ptr(),
        scores.itemsize * 8,
        table.data_ptr(),
        words.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        out.data_ptr(),
        *scores.shape,
        x.shape[1],
        intermediate,
        top_k,
        renormalize,
        threads,
    )
    return out if inputs.dtype == x.dtype else out.to(x.dtype)


def _readable(tensor: Tensor) -> Tensor:
    """As the kernels read it: contiguous, bfloat16 or float32."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()


@cache
def _threads() -> int:
    """Start as many threads in numba as torch has, on the OpenMP runtime that torch uses too: vLLM has bound its
    threads to their cores. 1 where numba cannot use that runtime.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    try:
        numba.config.NUMBA_NUM_THREADS = threads  # pyright: ignore[reportAttributeAccessIssue]
        numba.config.THREADING_LAYER = "omp"  # pyright: ignore[reportAttributeAccessIssue]
        _launch_threads()
        numba.set_num_threads(threads)
    except (RuntimeError, ValueError):
        return 1
    return threads if numba.threading_layer() == "omp" else 1


def _cpu_experts_shape(
    x: Tensor,
    logits: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    table: Tensor,
    intermediate: int,
    top_k: int,
    renormalize: bool,
) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op(
    "cpu_experts", _cpu_experts, fake_impl=_cpu_experts_shape, target_lib=_library, dispatch_key="CPU"
)
