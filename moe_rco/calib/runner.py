"""Runs a decoder layer by layer, with the routed experts supplied from outside.

Attention, norms, routers and shared experts are the modules of transformers; what a routed expert is (original, pruned,
quantised) is decided by the `Experts` callable given to `run`. Layers are taken from `layers()` one after the other and never
looked at through hooks on the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from moe_rco.adapters import Adapter
from moe_rco.adapters.base import EMBEDDING, HEAD
from moe_rco.calib.refusals import REFUSALS, reason
from moe_rco.calib.streaming import Streaming, give_back
from moe_rco.calib.transfer import Mover
from moe_rco.calib.window import Window
from moe_rco.ckpt.reader import CONFIG, Checkpoint
from moe_rco.errors import ModelError

Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Inputs [..., H] and a weight [V, H] to [..., V]."""
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class Logits(Protocol):
    """The head of a model."""

    def __call__(self, h: torch.Tensor, project: Project = F.linear) -> torch.Tensor:
        """Last hidden states h [..., H] to float32 logits [..., V]; `project` multiplies by the head's weight."""
        ...


class Experts(Protocol):
    """The routed experts of every layer under some assignment."""

    def __call__(self, layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """x [T, H] and router logits [T, E] to the routed experts' output [T, H]."""
        ...


@dataclass(frozen=True)
class Context:
    """What every layer needs beside its input: positions, and a mask for each kind of attention."""

    position_ids: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    masks: dict[str, Any]


class Runner:
    """The dense part of a causal MoE model: everything except the routed experts.

    Weights are read from the checkpoint on construction, in `dtype`, to `device`; with `streaming` they are read when they
    are needed, a layer or two at a time. Weights named in `without` are left out: others are given wherever they are used.
    Raises ModelError when one is missing or of another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        device: torch.device,
        dtype: torch.dtype,
        streaming: Streaming | None = None,
        layers: int | None = None,
        without: Collection[str] = (),
    ) -> None:
        self.adapter, self.device, self.dtype = adapter, device, dtype
        self.config, model = _described(checkpoint, dtype)
        # Families that mix kinds of attention list them; the others are all sliding or all full.
        kind = (
            "full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"
        )
        self._attention = getattr(self.config, "layer_types", None) or [kind] * self.config.num_hidden_layers
        self.num_layers: int = self.config.num_hidden_layers if layers is None else layers
        self.moe_layers = frozenset(adapter.moe_layers(checkpoint.config))
        for layer in self.moe_layers:
            model.model.layers[layer].mlp.experts = nn.Identity()
        for name in {*without, *([HEAD] if EMBEDDING in without and self.tied else [])}:
            model.get_submodule(name.removesuffix(".weight")).weight = None
        model.requires_grad_(False).eval()
        self._checkpoint, self._mover = checkpoint, Mover(device)
        self._sources = {
            name: self._source(name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._decoder, self._norm = model.model, model.model.norm
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(self.config).to(device)
        self._contexts: dict[tuple[int, ...], Context] = {}
        self._window: Window[int, dict[str, torch.Tensor]] | None = None
        self._embedding = self._head = None
        self._norm.load_state_dict({"weight": self._read("model.norm.weight")}, assign=True)
        if streaming is not None:
            self._window = Window(self._layer_weights, _nbytes, streaming.window)
            return
        self._embedding, self._head = (
            self._read(name) if name in self._sources else None for name in (EMBEDDING, HEAD)
        )
        for index, layer in enumerate(self._decoder.layers[: self.num_layers]):
            layer.load_state_dict(self._layer_weights(index), strict=True, assign=True)

    def _source(self, name: str, shape: tuple[int, ...]) -> str:
        """The tensor on disk a parameter of a shape is read from."""
        source = self.adapter.disk_name(name)
        tensor = self._checkpoint.tensors.get(source)
        if tensor is not None:
            if tensor.shape != shape:
                raise ModelError(
                    f"{self._checkpoint.directory}: tensor '{source}' has shape {list(tensor.shape)}, by config.json it "
                    f"should have {list(shape)}; download or copy the model again"
                )
            return source
        if name == HEAD and self.tied:
            return self._source(EMBEDDING, shape)
        raise ModelError(f"{self._checkpoint.directory}: tensor '{source}' is missing")

    def _read(self, name: str) -> torch.Tensor:
        return self._mover(self._checkpoint.read(self._sources[name])).to(self.dtype)

    def _layer_weights(self, index: int) -> dict[str, torch.Tensor]:
        names = (name for name, _ in self._decoder.layers[index].named_parameters())
        return {name: self._read(f"model.layers.{index}.{name}") for name in names}

    @property
    def tied(self) -> bool:
        """Whether the embeddings are the head as well."""
        return bool(self.config.tie_word_embeddings)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, Context]:
        """ids [B, S] to hidden states [B, S, H] and the context of the batch."""
        h = self.rows(ids)
        return h, self.context(h)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings [..., H] of some ids."""
        if self._embedding is not None:
            return F.embedding(ids, self._embedding)
        used, place = torch.unique(ids, return_inverse=True)
        rows = self._checkpoint.read_rows(self._sources[EMBEDDING], used.tolist())
        return F.embedding(place.to(self.device), self._mover(rows).to(self.dtype))

    def context(self, h: torch.Tensor) -> Context:
        """Positions and masks of hidden states [B, S, H]: the same for all of that shape."""
        key = tuple(h.shape[:2])
        if key not in self._contexts:
            position_ids = torch.arange(h.shape[1], device=self.device)[None]
            masks = {
                kind: MASKS[kind](
                    config=self.config,
                    inputs_embeds=h,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=position_ids,
                )
                for kind in set(self._attention)
            }
            self._contexts[key] = Context(position_ids, self._decoder.rotary_emb(h, position_ids), masks)
        return self._contexts[key]

    def layers(self, reverse: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Every decoder layer with its index, first to last or back; each is to be used before the next is taken."""
        order = [*range(self.num_layers)][:: -1 if reverse else 1]
        for position, index in enumerate(order):
            layer = self._decoder.layers[index]
            if self._window is None:
                yield index, layer
                continue
            empty = layer.state_dict(keep_vars=True)
            self._window.expect(order[position : position + 2])
            layer.load_state_dict(self._window.get(index), strict=True, assign=True)
            try:
                yield index, layer
            finally:
                layer.load_state_dict(empty, strict=True, assign=True)
                give_back()

    def attend(
        self, index: int, layer: Any, h: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention and what is added to it for every token, and the input of the feed-forward block; [B, S, H] each.

        The first is all of the layer's output but for its routed experts.
        """
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h),
            attention_mask=context.masks[self._attention[index]],
            position_ids=context.position_ids,
            position_embeddings=context.rotary,
        )
        h = h + attended
        x = layer.post_attention_layernorm(h)
        if index not in self.moe_layers:
            return h + layer.mlp(x), x
        shared = self.adapter.always_on(layer.mlp, x.reshape(-1, x.shape[-1]))
        return h if shared is None else h + shared.reshape(h.shape), x

    def step(
        self, index: int, layer: Any, h: torch.Tensor, context: Context, experts: Experts
    ) -> torch.Tensor:
        """One decoder layer: [B, S, H] to [B, S, H]."""
        h, x = self.attend(index, layer, h, context)
        if index not in self.moe_layers:
            return h
        flat = x.reshape(-1, x.shape[-1])
        return h + experts(index, flat, self.router(layer, flat)).reshape(h.shape)

    def router(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] to the router's logits [T, E]."""
        return F.linear(x, layer.mlp.gate.weight)

    def run(self, ids: torch.Tensor, experts: Experts) -> torch.Tensor:
        """ids [B, S] to the last hidden states [B, S, H], before the final norm."""
        h, context = self.embed(ids)
        for index, layer in self.layers():
            h = self.step(index, layer, h, context, experts)
        return h

    @contextmanager
    def head(self) -> Iterator[Logits]:
        """Maps last hidden states [..., H] to float32 logits [..., V]."""
        weight = self._head
        if weight is None and HEAD in self._sources:
            weight = self._read(HEAD)

        def logits(h: torch.Tensor, project: Project = F.linear) -> torch.Tensor:
            # Without a weight of its own there is a projection that does not need it.
            return project(self._norm(h), weight).float()  # pyright: ignore[reportArgumentType]

        yield logits

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., H] to float32 logits [..., V]."""
        with self.head() as logits:
            return logits(h)


def _described(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' configuration and model, without weights. Raises ModelError where it refuses what config.json says."""
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except REFUSALS as error:
        raise ModelError(
            f"transformers cannot use {checkpoint.directory / CONFIG} ({reason(error)}); correct it there"
        ) from error


def _nbytes(weights: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
