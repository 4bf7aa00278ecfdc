"""The small NaViL that the recipe trains: its sizes and its tokenizer."""

import re

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from navil import configuration_navil as configuration
from navil import image_processing_navil as image_processing
from navil import modeling_navil as modeling
from navil import processing_navil as processing
from navil import tokenization_navil as tokenization

from .drawing import SHADES, SHAPE_KINDS
from .tasks import GOODS, WORDINGS

PAD_TOKEN = "<|endoftext|>"
ROLE_LINES = ("system\n", "user\n", "assistant\n")


def question_words() -> list[str]:
    """The words that questions are made of; each becomes one token where a blank precedes it."""
    wordings = [re.sub(r"{.*?}", "", wording) for variants in WORDINGS.values() for wording in variants]
    sources = [*wordings, *GOODS, *SHADES, *SHAPE_KINDS, *(f"{kind}s" for kind in SHAPE_KINDS)]
    return sorted({word for source in sources for word in re.findall(r"[A-Za-z]{2,}", source)})


def build_tokenizer(words: list[str]):
    """A byte-level BPE that reads the questions' words and role lines whole and spells everything else.

    Merges only ever lengthen a stretch that begins with a blank, so an answer (which follows a line break) is spelled
    character by character: what is read off a picture comes out letter by letter.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for word in words:
        for end in range(1, len(word) + 1):
            left, right = "Ġ" + word[: end - 1], word[end - 1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(line, normalized=False, special=False) for line in ROLE_LINES])
    control = [PAD_TOKEN, *tokenization.CONTROL_TOKENS]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # Marks of a grounded answer are content: decoding keeps them.
    marks = [token for token in tokenization.IMAGE_TOKENS if token not in control]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in marks])
    return tokenization.NaViLTokenizer(
        tokenizer_object=backend,
        template="internlm2-chat",
        system_message="",
        pad_token=PAD_TOKEN,
        eos_token=tokenization.END_OF_TURN,
        additional_special_tokens=list(tokenization.CONTROL_TOKENS),
    )


def build_config(tokenizer):
    """18.1 M parameters: 8 vision blocks and 8 two-expert decoder layers, all of width 256."""
    return configuration.NaViLConfig(
        vision_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "layer_scale_init": 1.0,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "qk_norm": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        min_dynamic_patch=1024,
        max_dynamic_patch=2304,
        image_token_id=tokenizer.convert_tokens_to_ids(tokenization.IMAGE_TOKEN),
        image_start_token_id=tokenizer.convert_tokens_to_ids(tokenization.IMAGE_START_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer):
    model = modeling.NaViLForConditionalGeneration(build_config(tokenizer))
    model.generation_config.max_new_tokens = 64
    return model


def build_processor(tokenizer, config):
    area = config.vision_config.patch_size**2
    image_processor = image_processing.NaViLImageProcessor(
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        min_pixels=config.min_dynamic_patch * area,
        max_pixels=config.max_dynamic_patch * area,
        scale_downsample_ratio=config.scale_downsample_ratio,
    )
    return processing.NaViLProcessor(image_processor, tokenizer)


def load(folder, attn_implementation="sdpa"):
    """Model, in float32, and processor of a folder, with this repository's code: a published folder has none."""
    model = modeling.NaViLForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation=attn_implementation
    )
    tokenizer = tokenization.NaViLTokenizer.from_pretrained(folder)
    image_processor = image_processing.NaViLImageProcessor.from_pretrained(folder)
    return model, processing.NaViLProcessor(image_processor, tokenizer)
