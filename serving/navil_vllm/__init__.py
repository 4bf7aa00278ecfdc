"""NaViL as a model of vLLM: `pip install ./serving` beside vLLM, and vLLM finds it (docs/serving.md)."""

ARCHITECTURE = "NaViLForConditionalGeneration"


def register() -> None:
    """vLLM calls this in each of its processes; the model itself is imported only where it runs."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import NaViLServingConfig

    ModelRegistry.register_model(ARCHITECTURE, f"navil_vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = NaViLServingConfig
