"""OLMoE (OLMoE-1B-7B): every layer routes, to experts of the size that config.json calls `intermediate_size`."""

from moe_rco.adapters.base import Adapter


class Olmoe(Adapter):
    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    intermediate_key = "intermediate_size"
