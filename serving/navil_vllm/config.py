"""What vLLM's settings must be for NaViL; vLLM calls these hooks before it starts the engine."""

import os

import torch
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from .media import CONNECTOR, OWN_IMAGES

logger = init_logger(f"vllm.{__name__}")

VISUAL_EXPERTS = ("attention", "ffn")
DRAFTS_OF_TEXT = ("ngram", "ngram_gpu", "suffix")
"""Methods of speculative decoding without a second model, which would need the mask of visual tokens."""


class NaViLServingConfig:
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Caps the context at the trained one under dynamic NTK scaling, and has image files read by the package.

        Beyond the trained context, dynamic NTK scaling changes the angles of all tokens with each new one, also of
        those in the cache.

        Raises:
            ValueError: `max_model_len` lies above the cap; packed weights in float32 on a CPU; or visual tokens that
                run on a text expert.
        """
        text_config = model_config.hf_text_config
        experts = getattr(text_config, "visual_experts", VISUAL_EXPERTS)
        if set(experts) != set(VISUAL_EXPERTS):
            raise ValueError(f"vLLM runs models with the visual experts {VISUAL_EXPERTS}; this one has {list(experts)}")
        quantization = getattr(model_config.hf_config, "quantization_config", None) or {}
        is_packed = quantization.get("format") == "pack-quantized"
        if is_packed and model_config.dtype == torch.float32 and current_platform.is_cpu():
            raise ValueError("on a CPU, packed 4-bit weights need --dtype bfloat16 or float16, got float32")
        trained = text_config.max_position_embeddings
        if text_config.rope_type == "dynamic" and model_config.max_model_len > trained:
            given = model_config.original_max_model_len
            if given is not None and given > trained:
                raise ValueError(
                    f"max_model_len is {given}, but a cache cannot hold more than the {trained} tokens of the trained "
                    "context: dynamic NTK scaling would change the keys of all tokens with each new one"
                )
            logger.info("The context is capped at the trained %d tokens.", trained)
            model_config.max_model_len = trained
        if model_config.multimodal_config is not None:
            model_config.multimodal_config.media_io_kwargs.setdefault("image", {})[OWN_IMAGES] = True
            os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Allows CUDA graphs for pieces of the model only.

        A step with visual tokens runs outside the graph. A graph of the whole model would also take an image's last
        token, alone in its chunk, for a decoding step.

        Raises:
            ValueError: pipeline parallelism, micro-batches, LoRA adapters on the encoder, or a draft model.
        """
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError("NaViL has no pipeline parallelism: use tensor parallelism, or replicas")
        if parallel.use_ubatching:
            raise ValueError("NaViL cannot split a step into micro-batches: leave out --enable-dbo and --ubatch-size")
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError("adapters may change the experts only: leave out --enable-tower-connector-lora")
        speculation = vllm_config.speculative_config
        if speculation is not None and speculation.method not in DRAFTS_OF_TEXT:
            raise ValueError(f"speculative decoding is {' or '.join(DRAFTS_OF_TEXT)} here, got {speculation.method!r}")
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode is None or compilation.cudagraph_mode.has_full_cudagraphs():
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
