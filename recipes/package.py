"""This repository's own modules, loaded the way transformers loads remote code."""

from convert_checkpoint import configuration, image_processing, navil_module, processing, tokenization

modeling = navil_module("modeling_navil", "NaViLForConditionalGeneration")

__all__ = ["configuration", "image_processing", "modeling", "processing", "tokenization"]
