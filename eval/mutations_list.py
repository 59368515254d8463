"""Deliberate faults of one line: where, what stands there, what is put there, what a user would get, and what is to notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """`line` occurs once in `file` (below moe_rco/) and becomes `fault`; `tests` are files below tests/, or tests in them."""

    file: str
    line: str
    fault: str
    harm: str
    tests: tuple[str, ...]


def _m(file: str, line: str, fault: str, harm: str, *tests: str) -> Mutation:
    return Mutation(file, line, fault, harm, tests)


MUTATIONS = (
    _m(
        "optim/manifold.py", "return p.mul_(self._excess - mean)", "return p.mul_(self._excess)",
        "the search leaves the budget's tangent plane", "optim/test_manifold.py",
    ),
    _m(
        "optim/manifold.py", "self._segments.spread(-factor))", "self._segments.spread(factor))",
        "projection doubles what it is to remove", "optim/test_manifold.py",
    ),
    _m(
        "optim/manifold.py", "(column > 0).to(torch.float64)", "(column < 0).to(torch.float64)",
        "retraction from far away overflows", "optim/test_manifold.py",
    ),
    _m(
        "optim/adam.py", "(self.second / (1 - beta2**self.steps))", "self.second",
        "first steps are thirty times too long", "optim/test_adam.py",
    ),
    _m(
        "optim/adam.py", "self.first = self.manifold.transport(moved, first)", "self.first = first",
        "momentum points off the budget", "optim/test_adam.py",
    ),
    _m(
        "optim/gumbel.py", "log_u = torch.log1p(-u)", "log_u = torch.log(u)",
        "every pair of samples is twice the same", "optim/test_gumbel.py",
    ),
    _m(
        "optim/gumbel.py", "return hard + (soft - soft.detach())", "return hard + (soft.detach() - soft)",
        "the search climbs", "optim/test_gumbel.py",
    ),
    _m(
        "optim/mckp_dual.py", "missing = floor[layer] - kept", "missing = 0",
        "layers keep fewer experts than a token uses", "optim/test_mckp.py",
    ),
    _m(
        "optim/mckp_core.py", "loss + price * max(0, room - most[g + 1]) > limit:", "loss > limit / 2:",
        "good assignments are cut off, and the rest is called optimal", "optim/test_mckp.py",
    ),
    _m(
        "optim/mckp_core.py", "room = target - key // width", "room = target - key // width + 1",
        "the optimum is a byte over the budget", "optim/test_mckp.py",
    ),
    _m(
        "optim/posterior.py", "rows[row, columns[len(row) :]] = -1", "rows[row, columns[len(row) :]] = 1",
        "what was learnt of the old option counts for it, not against", "optim/test_posterior.py",
    ),
    _m(
        "optim/races.py", "return found, change, error, change < -_LAST * error",
        "return found, change, error, change < _LAST * error",
        "a challenger wins that is no better", "optim/test_races.py",
    ),
    _m(
        "optim/races.py", "(found - self._known)[order[:done]]", "(found - self._known)[:done]",
        "sequences are compared that were not run", "optim/test_races.py",
    ),
    _m(
        "optim/swaps.py", "changed = choice.copy()", "changed = choice",
        "the best assignment is overwritten by every attempt", "optim/test_swaps.py",
    ),
    _m(
        "optim/overlap.py", "flat = flat - (inverse @ (normal @ flat)) @ normal",
        "flat = flat + (inverse @ (normal @ flat)) @ normal",
        "with several budgets steps leave all of them", "optim/test_overlap.py",
    ),
    _m(
        "optim/equal_layers.py", "ceiling = max(ceiling, found.bound)", "ceiling = found.bound",
        "an optimum is claimed that is none", "optim/test_equal_layers.py",
    ),
    _m(
        "quant/grid.py", "return -(1 << (bits - 1)), (1 << (bits - 1)) - 1", "return -(1 << (bits - 1)), 1 << (bits - 1)",
        "the largest code does not fit into its bits", "quant",
    ),
    _m(
        "quant/grid.py", "codes += grid.zero.unsqueeze(-1)", "codes -= grid.zero.unsqueeze(-1)",
        "2 and 3 bits are rounded around the wrong zero", "quant",
    ),
    _m(
        "quant/grid.py", "stored = (scale * power.abs()).clamp(_TINY, limit).copysign(power).to(SCALE_DTYPE)",
        "stored = (scale * power.abs()).to(SCALE_DTYPE)",
        "scales lose their sign, overflow, or are zero", "quant",
    ),
    _m(
        "quant/gptq.py", "current[:, stop:].baddbmm_(factor[:, block, stop:].transpose(1, 2), error, alpha=-1)",
        "current[:, stop:].baddbmm_(factor[:, block, stop:].transpose(1, 2), error)",
        "errors are doubled where they are to be made up for", "quant/test_gptq.py",
    ),
    _m(
        "quant/gptq.py", "pivots[:, index, None]", "1",
        "GPTQ spreads errors by the wrong amount", "quant/test_gptq.py",
    ),
    _m(
        "quant/gptq.py", "codes = codes.gather(1, inverse.unsqueeze(-1).expand_as(codes))", "codes = codes",
        "columns stay in the order of their importance", "quant/test_gptq.py",
    ),
    _m(
        "quant/hessian.py", "x = x * weight.sqrt().unsqueeze(-1)", "x = x * weight.unsqueeze(-1)",
        "tokens count by the square of their weight", "quant/test_hessian.py",
    ),
    _m(
        "quant/hessian.py", "result[expert] = own * hessian[expert] + (1 - own) * target",
        "result[expert] = hessian[expert]",
        "experts with few tokens are fitted to their noise", "quant/test_hessian.py",
    ),
    _m(
        "quant/packing.py", "PACKED: ((rows, math.ceil(columns / per_word)), torch.int32),",
        "PACKED: ((rows, columns // per_word), torch.int32),",
        "files are larger than the budget says", "quant/test_packing.py",
    ),
    _m(
        "quant/packing.py", "_pack(zero.transpose(-1, -2), option.bits).transpose(-1, -2).contiguous()",
        "_pack(zero.transpose(-1, -2), option.bits).contiguous()",
        "zero points nobody else can read", "quant/test_packing.py",
    ),
    _m(
        "quant/packing.py", "(packed >> width) & ((1 << width) - 1)], -1)", "(packed >> width)], -1)",
        "every second half of a 3-bit word is read wrongly", "quant/test_packing.py",
    ),
    _m(
        "quant/packing.py", "sum(part(weight, option) for weight in group.weights)",
        "sum(part(weight, option) for weight in group.weights[:2])",
        "a third of every expert's bytes is not counted", "quant/test_packing.py", "ckpt/test_rewrite.py",
    ),
    _m(
        "quant/packing.py", "SCALE: ((rows, groups), SCALE_DTYPE),", "SCALE: ((rows, groups), torch.float32),",
        "scales are counted and looked for in twice their bytes", "quant/test_packing.py",
    ),
    _m(
        "quant/gptq.py", "    diagonal += damping\n", "    diagonal += 0\n",
        "what no token excited is divided by nothing", "quant/test_gptq.py",
    ),
    _m(
        "quant/gptq.py", "if not bool(hessian.isfinite().all()):", "if False:",
        "NaN in the statistics becomes NaN in the weights", "quant/test_gptq.py",
    ),
    _m(
        "quant/grid.py", "importance[matrix].flatten(0, 1)", "importance[matrix * 0].flatten(0, 1)",
        "all experts' scales are fitted to the first one's tokens", "quant",
    ),
    _m(
        "ckpt/header.py", "if position > size:", "if False:",
        "a truncated model is read", "ckpt/test_header.py",
    ),
    _m(
        "ckpt/header.py", "if tensor.offset != position:", "if tensor.offset > position:",
        "overlapping tensors are read", "ckpt/test_header.py",
    ),
    _m(
        "ckpt/header.py", "if len(result) < len(pairs):", "if False:",
        "of two tensors of one name one is lost", "ckpt/test_header.py",
    ),
    _m(
        "ckpt/reader.py", "if path.is_symlink() and target.parent != home and not in_cache:", "if False:",
        "a link leads to files outside of the model", "ckpt/test_reader.py",
    ),
    _m(
        "ckpt/reader.py", "if placed.get(name) != file:", "if name not in placed:",
        "a tensor that is in two files is read from the last", "ckpt/test_reader.py",
    ),
    _m(
        "ckpt/store.py", 'if sha256_of(path) != self._index["files"][name]:', "if False:",
        "damaged experts are written into the model", "ckpt/test_store.py",
    ),
    _m(
        "ckpt/store.py", 'if index.get("fingerprint") != self.fingerprint:', "if False:",
        "experts of another model or text are used", "ckpt/test_store.py",
    ),
    _m(
        "ckpt/state.py", "json.dumps([self.fingerprint, plain], sort_keys=True)", "json.dumps(plain, sort_keys=True)",
        "a search goes on from another model's", "ckpt/test_state.py",
    ),
    _m(
        "ckpt/shards.py", 'found["inputs"] == inputs', 'found["inputs"]',
        "a resumed run keeps shards of another plan", "ckpt/test_shards.py",
    ),
    _m(
        "ckpt/shards.py", "if not shards or entry.nbytes > room:", "if not shards:",
        "all weights are in one file", "ckpt/test_shards.py",
    ),
    _m(
        "ckpt/rewrite.py", "if expert_bytes != plan.cost or expert_bytes > plan.budget:", "if expert_bytes > plan.budget:",
        "files and plan disagree", "ckpt/test_rewrite.py", "contract/test_adapters.py",
    ),
    _m(
        "ckpt/rewrite.py", "elif path.name not in found.digests:", "elif False:",
        "a resumed run leaves shards of another plan beside its own", "ckpt/test_rewrite.py",
    ),
    _m(
        "ckpt/rewrite.py", "if tensor.name not in options:",
        "if tensor.name not in options or not options[tensor.name][1].is_quantized:",
        "pruned experts stay in the files", "ckpt/test_rewrite.py",
    ),
    _m(
        "ckpt/rewrite.py", "entries.append(from_file(tensor) if kept is None else rows(tensor, kept))",
        'entries.append(from_file(tensor, dtype=torch.bfloat16 if "gate" in tensor.name else None) if kept is None '
        "else rows(tensor, kept))",
        "routers and shared experts lose their precision", "ckpt/test_rewrite.py", "contract/test_adapters.py",
    ),
    _m(
        "ckpt/writer.py", "entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])", "entries = list(entries)",
        "tensors begin where readers cannot map them", "ckpt/test_writer.py",
    ),
    _m(
        "ckpt/writer.py", "    write_text(partial, text)\n", "    write_text(path, text)\n    write_text(partial, text)\n",
        "who reads while it is written finds half a file", "ckpt",
    ),
    _m(
        "ckpt/shards.py", " and sha256_of(shard) == self.digests[shard.name]", "",
        "a damaged shard is taken for complete", "ckpt/test_shards.py",
    ),
    _m(
        "ckpt/destination.py", "            os.rename(destination, old)\n", "            shutil.rmtree(destination)\n",
        "killed at the wrong moment, the old result is gone and the new one is not there", "ckpt/test_destination.py",
    ),
    _m(
        "ckpt/destination.py", "if names and not (_is_ours(destination) or _is_ours_of_several(destination)):", "if False:",
        "--overwrite deletes a directory that is none of ours", "ckpt/test_destination.py",
    ),
    _m(
        "ckpt/workdir.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two runs write into the same files", "ckpt/test_workdir.py",
    ),
    _m(
        "ckpt/workdir.py", "if Lock(self.lock, descriptor).held:", "if True:",
        "a lock that was removed keeps nobody out", "ckpt/test_workdir.py",
    ),
    _m(
        "ckpt/manifest.py", "if name.endswith(SUFFIX) and path.stat().st_size != file.bytes:", "if False:",
        "a truncated model is served", "test_integrity.py",
    ),
    _m(
        "ckpt/rewrite.py", "if not option.is_quantized:\n            yield from_file(tensor,",
        "if not option.is_quantized and False:\n            yield from_file(tensor,",
        "experts kept in bf16 are looked for in the store", "ckpt/test_rewrite.py",
    ),
    _m(
        "ckpt/stock.py", "for new, old in enumerate(kept):", "for new, old in enumerate(reversed(kept)):",
        "experts are swapped against their routers' rows", "ckpt/test_stock.py",
    ),
    _m(
        "ckpt/stock.py", "file.seek(tensor.offset + row * size)", "file.seek(tensor.offset)",
        "every router row is the first", "ckpt/test_stock.py",
    ),
    _m(
        "ckpt/manifest.py", "digest.update(chunk)\n            advance", "advance",
        "a flipped bit is not found", "test_integrity.py",
    ),
    _m(
        "adapters/base.py", 'return bool(config.get("norm_topk_prob", False))', "return True",
        "norm_topk_prob is ignored", "contract/test_adapters.py",
    ),
    _m(
        "calib/bank.py", "gate, up = gate_up.chunk(2, dim=-1)", "up, gate = gate_up.chunk(2, dim=-1)",
        "gate and up are swapped", "contract/test_adapters.py",
    ),
    _m(
        "serve/config.py", "if kept < adapter.top_k(config):", "if False:",
        "a model is served whose tokens find too few experts", "serve/test_config.py",
    ),
    _m(
        "serve/config.py", "if (tensor.shape, tensor.dtype) != (shape, DTYPE_NAMES[dtype]):", "if False:",
        "experts of another precision than promised are loaded", "serve/test_config.py",
    ),
    _m(
        "serve/experts.py", "chosen, ids = route(logits, self.top_k, self.renormalise, self.kept)",
        "chosen, ids = route(logits, self.top_k, self.renormalise)",
        "tokens are sent to pruned experts", "serve/test_hf.py",
    ),
    _m(
        "serve/experts.py", "return down(self.activation(gate(x)) * up(x))", "return down(self.activation(up(x)) * gate(x))",
        "transformers swaps gate and up", "serve/test_hf.py",
    ),
    _m(
        "serve/experts.py", "output = output * top_k_weights.flatten()[pairs, None]",
        "output = output * top_k_weights.flatten()[token, None]",
        "experts are weighed as for another token", "serve/test_hf.py",
    ),
    _m(
        "serve/vllm_shard.py", "return slice_packed(tensor.T, option.bits, begin, end).T",
        "return slice_packed(tensor.T, option.bits, 0, end - begin).T",
        "with tensor parallelism all processes use the first one's zero points", "serve/test_vllm_shard.py",
    ),
    _m(
        "serve/vllm_method.py", "if (tuple(loaded_weight.shape), loaded_weight.dtype) != (shape, dtype):", "if False:",
        "vLLM loads tensors of another shape than promised", "serve/test_vllm_engine.py::test_damage_is_refused",
    ),
    _m(
        "serve/vllm_shard.py", "tensor[:, begin // group : end // group]", "tensor[:, : (end - begin) // group]",
        "with tensor parallelism all processes use the first one's scales", "serve/test_vllm_shard.py",
    ),
    _m(
        "serve/vllm_shard.py", "first = begin // per_word", "first = -(-begin // per_word)",
        "codes that begin within a word are lost", "serve/test_vllm_shard.py",
    ),
    _m(
        "serve/vllm_method.py", '_MATRICES = {"w1": 0, "w3": 1, "w2": 2}', '_MATRICES = {"w1": 1, "w3": 0, "w2": 2}',
        "vLLM swaps gate and up", "serve/test_vllm_engine.py::test_agrees_with_transformers",
    ),
    _m(
        "serve/vllm_method.py", "if (expert, matrix, suffix) not in self._loaded:", "if False:",
        "vLLM serves experts that were never loaded", "serve/test_vllm_engine.py::test_damage_is_refused",
    ),
    _m(
        "types.py", "return not option.is_prune and all(", "return all(",
        "attention may be pruned", "contract/test_dense.py",
    ),
    _m(
        "calib/dense.py", "rows].float() - before).flatten())", "rows].float() + before).flatten())",
        "what an option does to attention is measured from the wrong weights", "calib/test_dense.py",
    ),
    _m(
        "serve/vllm_dense.py", "self._share(layer, self.group.weights[matrix].shape[0], size)", "(0, size)",
        "every process serves the first one's rows of attention", "serve/test_vllm_dense.py",
    ),
    _m(
        "serve/vllm_dense.py", "if (matrix, suffix) not in self._loaded:", "if False:",
        "vLLM serves attention that was never loaded", "serve/test_vllm_dense.py",
    ),
)  # fmt: skip
"""All of them, in the order of the package's rooms."""
