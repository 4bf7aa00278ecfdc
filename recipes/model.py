"""The small NaViL that the recipe trains: its config, tokenizer and processor."""

import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from navil.configuration_navil import NaViLConfig
from navil.image_processing_navil import NaViLImageProcessor
from navil.modeling_navil import NaViLForConditionalGeneration
from navil.processing_navil import NaViLProcessor
from navil.tokenization_navil import (
    CONTROL_TOKENS,
    END_OF_TURN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    NaViLTokenizer,
)

from .drawing import SHADES, SHAPE_KINDS
from .words import GOODS, WORDINGS

PAD_TOKEN = "<|endoftext|>"
ROLE_LINES = ("system\n", "user\n", "assistant\n")
MAX_NEW_TOKENS = 64


def question_words() -> list[str]:
    """The words that questions are made of."""
    wordings = [re.sub(r"{.*?}", "", wording) for variants in WORDINGS.values() for wording in variants]
    sources = [*wordings, *GOODS, *SHADES, *SHAPE_KINDS, *(f"{kind}s" for kind in SHAPE_KINDS)]
    return sorted({word for source in sources for word in re.findall(r"[A-Za-z]{2,}", source)})


def build_tokenizer() -> NaViLTokenizer:
    """A byte-level BPE with one token for each word of a question and one for each character of an answer.

    All merges start with a blank. An answer follows a line break, so no merge applies to its first word: what the model
    reads off a picture is spelled character by character.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for word in question_words():
        for end in range(1, len(word) + 1):
            left, right = "Ġ" + word[: end - 1], word[end - 1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(line, normalized=False, special=False) for line in ROLE_LINES])
    control = [PAD_TOKEN, *CONTROL_TOKENS]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # The tags of a grounded answer are content: decoding with skip_special_tokens keeps them.
    tags = [token for token in IMAGE_TOKENS if token not in control]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in tags])
    return NaViLTokenizer(
        tokenizer_object=backend,
        template="internlm2-chat",
        system_message="",
        pad_token=PAD_TOKEN,
        eos_token=END_OF_TURN,
        additional_special_tokens=list(CONTROL_TOKENS),
    )


def build_config(tokenizer: NaViLTokenizer, width: int = 256, num_layers: int = 8) -> NaViLConfig:
    """18.1 M parameters by default: 8 vision blocks and 8 decoder layers, all of width 256.

    Args:
        width: hidden size of vision encoder and decoder, a multiple of 128.
        num_layers: vision blocks, and as many decoder layers.
    """
    return NaViLConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": width // 64,
            "layer_scale_init": 1.0,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 5 * width // 2,
            "num_hidden_layers": num_layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 128,
            "head_dim": 64,
            "qk_norm": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        min_dynamic_patch=1024,
        max_dynamic_patch=2304,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_start_token_id=tokenizer.convert_tokens_to_ids(IMAGE_START_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(config: NaViLConfig) -> NaViLForConditionalGeneration:
    """A model with random weights."""
    model = NaViLForConditionalGeneration(config)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    return model


def build_processor(tokenizer: NaViLTokenizer, config: NaViLConfig) -> NaViLProcessor:
    return NaViLProcessor(NaViLImageProcessor.from_config(config), tokenizer)


def load(folder: Path | str, attn_implementation: str = "sdpa") -> tuple[NaViLForConditionalGeneration, NaViLProcessor]:
    """Model, in float32, and processor of a folder, with the code of this repository."""
    model = NaViLForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation=attn_implementation
    )
    tokenizer = NaViLTokenizer.from_pretrained(folder)
    return model, NaViLProcessor(NaViLImageProcessor.from_pretrained(folder), tokenizer)
