"""What vLLM loads by the entry point `vllm.general_plugins`: LLMs that read deep concepts."""

from __future__ import annotations

# By the name that a checkpoint gives (`deep_checkpoint`), where the class lies: vLLM loads it when it serves one.
ARCHITECTURES = {"CompLLMDeepLlamaForCausalLM": f"{__package__}.deep_llama:DeepLlamaForCausalLM"}


def register() -> None:
    """Tell vLLM of them; once or often."""
    from vllm import ModelRegistry

    for name, place in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, place)
