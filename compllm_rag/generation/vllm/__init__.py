"""vLLM as a generator: a server over HTTP, or its engine in this process; text and concepts."""

from compllm_rag.generation.vllm.generator import VLLMGenerator
from compllm_rag.generation.vllm.settings import VLLMSettings

__all__ = ["VLLMGenerator", "VLLMSettings"]
