"""Numba kernels that multiply by packed weights without ever expanding a matrix: what an expert costs at
decode is reading its packed bytes.

Layout of a matrix [R, C] in a layer's flat buffers. Rows come in blocks of 32, padded with zeros, so that a
vector holds one column of one block:
  words   int32 [R/32, W, 32]  the words on disk; column c is in word c // (32 // bits). bf16: two to a word
  scales  int16 [R/32, G, 32]  the bits of bfloat16 (none for bf16)
  zeros   int32 [R/32, G, bits]  the zero points' lowest bits, next bits, ...: bit i is row i's (none if symmetric)
Products are summed in float32; nothing is rounded between the two layers of an expert.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32
"""Rows in a block."""
CHUNK = 64
"""Columns unpacked at once where several tokens share them."""
SINGLE = 4
"""Up to this many tokens of an expert are multiplied one by one, straight from the packed weights."""
TILE = 4
"""Tokens multiplied at once by unpacked weights."""
TOKENS = 64
"""Most tokens of one expert in a task: their sums stay in the cache."""

# Columns of the table with one row an expert. No token is routed to one that is PRUNED; one of 0 BITS is held by
# another process and adds nothing here.
BITS, GROUP, ASYMMETRIC, WORDS, SCALES, ZEROS, PRUNED = 0, 1, 2, 3, 6, 9, 12
"""From WORDS, SCALES and ZEROS on, one offset for each of gate, up and down."""
TABLE_COLUMNS = 13

# Only fused multiply-add may change a result: infinities and NaN pass through, and sums have a fixed order.
_JIT: dict[str, Any] = {
    "fastmath": {"contract"},
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "cache": True,
}


_F = np.float32
_ANY = 1 << 40
"""The length of a buffer that is only read where the table says."""
_LOG2_E, _LN2_HIGH, _LN2_LOW, _ROUND = _F(1.44269504), _F(0.693359375), _F(-2.12194440e-4), _F(12582912)
_LANE_BITS = np.array([1 << lane for lane in range(LANES)], np.uint32).view(np.int32)
_C2, _C3, _C4, _C5, _C6, _C7 = _F(1 / 2), _F(1 / 6), _F(1 / 24), _F(1 / 120), _F(1 / 720), _F(1 / 5040)


def _unpacker(bits: int) -> tuple[Any, Any]:
    """Functions that unpack `count` columns of a block, and that multiply one token by them."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    step = max(1, 16 // per_word)  # words at once: enough columns to hide the sums' latency

    @njit(**_JIT)
    def unpack(words, begin, start, count, zero, scale, tile):
        word = start // per_word
        first = start - word * per_word
        done = 0
        while done < count:
            row = words[begin + word * LANES : begin + (word + 1) * LANES]
            if first == 0 and count - done >= per_word:
                columns = tile[done * LANES : (done + per_word) * LANES]
                for lane in range(LANES):
                    value, offset, factor = row[lane], zero[lane], scale[lane]
                    for j in range(per_word):
                        code = np.int32(((value >> (bits * j)) & mask) - offset)
                        columns[j * LANES + lane] = np.float32(code) * factor
                done += per_word
                word += 1
            else:
                column = tile[done * LANES : (done + 1) * LANES]
                for lane in range(LANES):
                    code = np.int32(((row[lane] >> (bits * first)) & mask) - zero[lane])
                    column[lane] = np.float32(code) * scale[lane]
                done += 1
                first += 1
                if first == per_word:
                    first = 0
                    word += 1

    @njit(**_JIT)
    def multiply(words, begin, start, count, zero, scale, x, x_at, totals, at):
        word = start // per_word
        first = start - word * per_word
        done = 0
        while done < count:
            if first == 0 and count - done >= step * per_word:
                rows = words[begin + word * LANES : begin + (word + step) * LANES]
                values = x[x_at + done : x_at + done + step * per_word]
                total = totals[at : at + LANES]
                for lane in range(LANES):
                    offset, even, odd = zero[lane], np.float32(0), np.float32(0)
                    for k in range(step):
                        value = rows[k * LANES + lane]
                        for j in range(0, per_word, 2):
                            code = np.int32(((value >> (bits * j)) & mask) - offset)
                            even += np.float32(code) * values[k * per_word + j]
                            code = np.int32(((value >> (bits * (j + 1))) & mask) - offset)
                            odd += np.float32(code) * values[k * per_word + j + 1]
                    total[lane] += (even + odd) * scale[lane]
                done += step * per_word
                word += step
            else:
                row, factor = words[begin + word * LANES : begin + (word + 1) * LANES], x[x_at + done]
                total = totals[at : at + LANES]
                for lane in range(LANES):
                    code = np.int32(((row[lane] >> (bits * first)) & mask) - zero[lane])
                    total[lane] += np.float32(code) * factor * scale[lane]
                done += 1
                first += 1
                if first == per_word:
                    first = 0
                    word += 1

    return unpack, multiply


_unpack2, _multiply2 = _unpacker(2)
_unpack3, _multiply3 = _unpacker(3)
_unpack4, _multiply4 = _unpacker(4)
_unpack8, _multiply8 = _unpacker(8)


@njit(**_JIT)
def _bfloat16(bits):
    return np.int32(bits << 16).view(np.float32)


@njit(**_JIT)
def _unpack16(words, begin, start, count, tile):
    for done in range(0, count, 2):  # start is a multiple of CHUNK, the last word of an odd row is padded
        at = begin + (start + done) // 2 * LANES
        row, columns = words[at : at + LANES], tile[done * LANES : (done + 2) * LANES]
        for lane in range(LANES):
            columns[lane] = _bfloat16(row[lane])
            columns[LANES + lane] = np.int32(row[lane] & -65536).view(np.float32)


@njit(**_JIT)
def _multiply16(words, begin, start, count, x, x_at, totals, at):
    done = 0
    total = totals[at : at + LANES]
    while done + 16 <= count:
        first = begin + (start + done) // 2 * LANES
        rows = words[first : first + 8 * LANES]
        values = x[x_at + done : x_at + done + 16]
        for lane in range(LANES):
            even, odd = total[lane], np.float32(0)
            for j in range(8):
                word = rows[j * LANES + lane]
                even += np.int32(word << 16).view(np.float32) * values[2 * j]
                odd += np.int32(word & -65536).view(np.float32) * values[2 * j + 1]
            total[lane] = even + odd
        done += 16
    while done < count:
        first = begin + (start + done) // 2 * LANES
        row = words[first : first + LANES]
        shift = 16 if (start + done) % 2 == 0 else 0
        for lane in range(LANES):
            total[lane] += np.int32((row[lane] << shift) & -65536).view(np.float32) * x[x_at + done]
        done += 1


@njit(**_JIT)
def _accumulate(tile, count, x, x_at, stride, totals, at):
    """totals[at:] [TILE, LANES] += x[x_at:] [TILE, count] (rows `stride` apart) @ tile [count, LANES]"""
    sums = totals[at : at + TILE * LANES]
    at0, at1, at2, at3 = x_at, x_at + stride, x_at + 2 * stride, x_at + 3 * stride
    column = 0
    while column + 8 <= count:
        weights = tile[column * LANES : (column + 8) * LANES]
        x0, x1, x2, x3 = x[at0 : at0 + 8], x[at1 : at1 + 8], x[at2 : at2 + 8], x[at3 : at3 + 8]
        for lane in range(LANES):
            sum0, sum1 = sums[lane], sums[LANES + lane]
            sum2, sum3 = sums[2 * LANES + lane], sums[3 * LANES + lane]
            for j in range(8):
                weight = weights[j * LANES + lane]
                sum0 += weight * x0[j]
                sum1 += weight * x1[j]
                sum2 += weight * x2[j]
                sum3 += weight * x3[j]
            sums[lane], sums[LANES + lane] = sum0, sum1
            sums[2 * LANES + lane], sums[3 * LANES + lane] = sum2, sum3
        column += 8
        at0, at1, at2, at3 = at0 + 8, at1 + 8, at2 + 8, at3 + 8
    while column < count:
        for token in range(TILE):
            factor = x[x_at + token * stride + column]
            for lane in range(LANES):
                sums[token * LANES + lane] += tile[column * LANES + lane] * factor
        column += 1


@njit(**_JIT)
def _group_grid(entry, matrix, scales, zeros, groups, group, block, scale, zero):
    """Scales and zero points of a block's rows in one group of columns."""
    at = entry[SCALES + matrix] + (block * groups + group) * LANES
    for lane in range(LANES):
        scale[lane] = _bfloat16(np.int32(scales[at + lane]))
    if entry[ASYMMETRIC]:
        bits = entry[BITS]
        at = entry[ZEROS + matrix] + (block * groups + group) * bits
        for k in range(bits):
            plane, value = zeros[at + k], np.int32(1 << k)
            for lane in range(LANES):
                before = zero[lane] if k else np.int32(0)
                zero[lane] = before + (value if plane & _LANE_BITS[lane] else np.int32(0))


@njit(**_JIT)
def _project(
    entry, matrix, words, scales, zeros, block, columns, x, x_at, tokens, tile, scale, zero, totals, at
):
    """totals[at:] [tokens, LANES] = x[x_at:] [tokens, columns] @ the transposed rows of one block.

    `tokens` is at most SINGLE or a multiple of TILE; `tile`, `scale` and `zero` are scratch. Parts of arrays
    are passed as positions: a slice costs as much as a group of columns.
    """
    bits, group = entry[BITS], entry[GROUP]
    if group == 0:
        group = columns
    per_word = 32 // bits
    width, groups = (columns + per_word - 1) // per_word, columns // group
    begin = entry[WORDS + matrix] + block * width * LANES
    for i in range(at, at + tokens * LANES):
        totals[i] = 0
    for lane in range(LANES):
        zero[lane] = 1 << (bits - 1) if bits < 16 else 0
    for g in range(groups):
        if bits < 16:
            _group_grid(entry, matrix, scales, zeros, groups, g, block, scale, zero)
        end = (g + 1) * group
        for start in range(g * group, end, CHUNK):
            count = min(CHUNK, end - start)
            if tokens <= SINGLE:
                for token in range(tokens):
                    row, to = x_at + token * columns + start, at + token * LANES
                    if bits == 4:
                        _multiply4(words, begin, start, count, zero, scale, x, row, totals, to)
                    elif bits == 8:
                        _multiply8(words, begin, start, count, zero, scale, x, row, totals, to)
                    elif bits == 3:
                        _multiply3(words, begin, start, count, zero, scale, x, row, totals, to)
                    elif bits == 2:
                        _multiply2(words, begin, start, count, zero, scale, x, row, totals, to)
                    else:
                        _multiply16(words, begin, start, count, x, row, totals, to)
            else:
                if bits == 4:
                    _unpack4(words, begin, start, count, zero, scale, tile)
                elif bits == 8:
                    _unpack8(words, begin, start, count, zero, scale, tile)
                elif bits == 3:
                    _unpack3(words, begin, start, count, zero, scale, tile)
                elif bits == 2:
                    _unpack2(words, begin, start, count, zero, scale, tile)
                else:
                    _unpack16(words, begin, start, count, tile)
                for token in range(0, tokens, TILE):
                    row = x_at + token * columns + start
                    _accumulate(tile, count, x, row, columns, totals, at + token * LANES)


@njit(**_JIT)
def _activate(values, gate_at, up_at, weight, result, at, count):
    """result[at:] = silu(values[gate_at:]) * values[up_at:] * weight, to float32's precision, in operations that
    vectorise (the library's exp does not).
    """
    gate, up, part = values[gate_at : gate_at + count], values[up_at : up_at + count], result[at : at + count]
    for i in range(count):
        y = -gate[i] if -gate[i] < _F(88) else _F(88)
        y = y if y > _F(-87) else _F(-87)
        # exp(y) = 2^n exp(r) with |r| <= ln(2) / 2; adding and subtracting 1.5 * 2^23 rounds to an integer.
        n = (y * _LOG2_E + _ROUND) - _ROUND
        r = y - n * _LN2_HIGH - n * _LN2_LOW
        exp = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
        exp = (exp * r + _F(1)) * r + _F(1)
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        part[i] = gate[i] / (_F(1) + exp * power) * up[i] * weight


@njit(**_JIT)
def _route(logits, table, renormalize, ids, weights):
    """The ids int32 and weights float32 [T, k] of the best experts that are not pruned, best first: softmax over all
    of those, or over the chosen where `renormalize`. logits float32 [T, E]. A token with a NaN gets NaN weights.
    """
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    best = np.empty(top_k, np.float32)
    for token in range(tokens):
        best[:] = -np.inf
        ids[token] = -1
        undefined = False
        for expert in range(experts):
            logit = logits[token, expert]
            undefined |= logit != logit
            if logit > best[top_k - 1] and not table[expert, PRUNED]:
                at = top_k - 1
                while at > 0 and logit > best[at - 1]:
                    best[at], ids[token, at] = best[at - 1], ids[token, at - 1]
                    at -= 1
                best[at], ids[token, at] = logit, expert
        total = _F(0)
        if renormalize:
            for j in range(top_k):
                total += np.exp(best[j] - best[0])
        else:
            for expert in range(experts):
                if not table[expert, PRUNED]:
                    total += np.exp(logits[token, expert] - best[0])
        for j in range(top_k):
            weights[token, j] = _F(np.nan) if undefined else np.exp(best[j] - best[0]) / total
            if ids[token, j] < 0:  # so few finite logits: any expert, whose output the NaN then replaces
                ids[token, j] = 0


def _experts(x, ids, weights, table, words, scales, zeros, intermediate, workers, out):
    """out [T, H] = the weighted sum of the chosen experts' outputs.

    x float32 [T, H], ids int32 and weights float32 [T, k], table int64 [E, TABLE_COLUMNS]. The work is
    dealt out in `workers` parts.
    """
    tokens, hidden = x.shape
    top_k = ids.shape[1]
    flat = out.reshape(-1)
    flat[:] = 0
    experts = table.shape[0]
    counts = np.zeros(experts, np.int64)
    for token in range(tokens):
        for j in range(top_k):
            expert = ids[token, j]
            if table[expert, BITS] > 0:
                counts[expert] += 1
    # Slots: the (token, expert) pairs in order of their experts, each expert's padded to whole tiles.
    starts = np.zeros(experts, np.int64)
    slots, tasks = 0, 0
    for expert in range(experts):
        starts[expert] = slots
        if counts[expert] > SINGLE:
            counts[expert] = (counts[expert] + TILE - 1) // TILE * TILE
        slots += counts[expert]
        tasks += (counts[expert] + TOKENS - 1) // TOKENS
    task_expert = np.empty(tasks, np.int64)
    task_start = np.empty(tasks, np.int64)
    task_slots = np.empty(tasks, np.int64)
    task = 0
    for expert in range(experts):
        for first in range(0, counts[expert], TOKENS):
            task_expert[task], task_start[task] = expert, starts[expert] + first
            task_slots[task] = min(TOKENS, counts[expert] - first)
            task += 1
    slot_token = np.full(slots, -1, np.int64)
    slot_weight = np.zeros(slots, np.float32)
    inputs = np.zeros(slots * hidden, np.float32)
    for token in range(tokens):
        for j in range(top_k):
            expert = ids[token, j]
            if table[expert, BITS] > 0:
                slot = starts[expert]
                starts[expert] += 1
                slot_token[slot], slot_weight[slot] = token, weights[token, j]
                inputs[slot * hidden : (slot + 1) * hidden] = x[token]
    middle = np.empty(slots * intermediate, np.float32)
    blocks = (intermediate + LANES - 1) // LANES
    for worker in prange(workers):
        tile, scale = np.empty(CHUNK * LANES, np.float32), np.empty(LANES, np.float32)
        zero, both = np.empty(LANES, np.int32), np.empty(2 * TOKENS * LANES, np.float32)
        for index in range(np.int64(worker), tasks * blocks, workers):
            task, block = index // blocks, index % blocks
            entry, begin, n = table[task_expert[task]], task_start[task], task_slots[task]
            for matrix in range(2):
                _project(
                    entry,
                    matrix,
                    words,
                    scales,
                    zeros,
                    block,
                    hidden,
                    inputs,
                    begin * hidden,
                    n,
                    tile,
                    scale,
                    zero,
                    both,
                    matrix * n * LANES,
                )
            rows = min(LANES, intermediate - block * LANES)
            for slot in range(n):
                at = (begin + slot) * intermediate + block * LANES
                weight = slot_weight[begin + slot]
                _activate(both, slot * LANES, (n + slot) * LANES, weight, middle, at, rows)
    # One worker owns a block of the output's columns, so that its sums run over the experts in a fixed order.
    blocks = (hidden + LANES - 1) // LANES
    for worker in prange(workers):
        tile, scale = np.empty(CHUNK * LANES, np.float32), np.empty(LANES, np.float32)
        zero, down = np.empty(LANES, np.int32), np.empty(TOKENS * LANES, np.float32)
        for block in range(np.int64(worker), blocks, workers):
            rows = min(LANES, hidden - block * LANES)
            for task in range(tasks):
                entry, begin, n = table[task_expert[task]], task_start[task], task_slots[task]
                _project(
                    entry,
                    2,
                    words,
                    scales,
                    zeros,
                    block,
                    intermediate,
                    middle,
                    begin * intermediate,
                    n,
                    tile,
                    scale,
                    zero,
                    down,
                    0,
                )
                for slot in range(n):
                    token = slot_token[begin + slot]
                    if token >= 0:
                        at = token * hidden + block * LANES
                        for lane in range(rows):
                            flat[at + lane] += down[slot * LANES + lane]


@njit(**_JIT)
def _widen(half, result):
    """bfloat16, as int16, to float32."""
    for i in range(len(half)):
        result[i] = _bfloat16(np.int32(half[i]))


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _run(
    x,
    x_bits,
    logits,
    logits_bits,
    table,
    words,
    scales,
    zeros,
    out,
    tokens,
    num_experts,
    hidden,
    intermediate,
    top_k,
    renormalize,
    workers,
):
    """`_experts` on memory named by addresses: an array object for each tensor costs a microsecond, every layer.

    Addresses of the tensors, then sizes. x and out are float32, or bfloat16 where `x_bits` is 16, and so the logits.
    """
    if x_bits == 16:
        inputs = np.empty((tokens, hidden), np.float32)
        outputs = np.empty((tokens, hidden), np.float32)
        _widen(carray(_pointer(x), (tokens * hidden,), np.int16), inputs.reshape(-1))
    else:
        inputs = carray(_pointer(x), (tokens, hidden), np.float32)
        outputs = carray(_pointer(out), (tokens, hidden), np.float32)
    if logits_bits == 16:
        scores = np.empty((tokens, num_experts), np.float32)
        _widen(carray(_pointer(logits), (tokens * num_experts,), np.int16), scores.reshape(-1))
    else:
        scores = carray(_pointer(logits), (tokens, num_experts), np.float32)
    entries = carray(_pointer(table), (num_experts, TABLE_COLUMNS), np.int64)
    ids, weights = np.empty((tokens, top_k), np.int32), np.empty((tokens, top_k), np.float32)
    _route(scores, entries, renormalize, ids, weights)
    _experts(
        inputs,
        ids,
        weights,
        entries,
        carray(_pointer(words), (_ANY,), np.int32),
        carray(_pointer(scales), (_ANY,), np.int16),
        carray(_pointer(zeros), (_ANY,), np.int32),
        intermediate,
        workers,
        outputs,
    )
    if x_bits == 16:
        half = carray(_pointer(out), (tokens * hidden,), np.int16)
        bits = outputs.reshape(-1).view(np.int32)
        for i in range(len(bits)):
            rounded = np.int32((bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16)  # to nearest, ties to even
            nan = np.int32(bits[i] & 0x7FFFFFFF) > np.int32(0x7F800000)
            half[i] = np.int16(0x7FC0) if nan else np.int16(rounded)


def _compiled(suffix: str, **options: Any) -> Any:
    """`_run`, with an `_experts` compiled by `options`.

    Numba finds what an earlier process compiled by a function's name, bytecode and closure, whatever its options and whichever
    function a global name stands for; a closure with a compiled function in it never is the same again. So each has its name.
    """
    known: dict[str, Any] = {}
    for function, its in ((_experts, options), (_run, {})):
        copy = FunctionType(function.__code__, globals() | known, f"{function.__name__}_{suffix}")
        copy.__qualname__ = copy.__name__
        known[function.__name__] = njit(**_JIT, **its)(copy)
    return known["_run"]


run_experts = _compiled("serial")
"""`_experts` on the calling thread: for the little work of a small model's decoding."""
run_experts_parallel = _compiled("parallel", parallel=True)
"""`_experts` on the threads of numba's OpenMP layer, which are torch's own."""
