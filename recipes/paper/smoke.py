"""The whole way from a text LLM to answers about pictures, small: from-llm, S1.1, S1.2, S2, verify, chat.

python -m recipes.paper.smoke runs/paper-smoke
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import convert_checkpoint

from . import __main__ as paper

COLORS = ("red", "blue")
QUESTION = "What color is it?"
SETTINGS = ("--global-batch", "1", "--row-length", "512", "--max-patches", "256")
FASTER = ("--learning_rate", "3e-3", "--warmup_steps", "2", "--bf16", "false", "--logging_steps", "1")
STEPS = {"s1.1": 10, "s1.2": 10, "s2": 60}


def write_llm(folder: Path) -> None:
    """A Qwen3 with random weights and a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> tuple[Path, Path]:
    """Pictures of one color: pairs of image and caption, and instructions in LLaVA's format."""
    pairs, instructions = [], []
    for color in COLORS:
        file = f"{color}.png"
        Image.new("RGB", (64, 64), color).save(folder / file)
        pairs.append({"image": file, "caption": f"a {color} square"})
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": color}]
        instructions.append({"image": file, "conversations": turns})
    files = folder / "pairs.jsonl", folder / "instructions.json"
    files[0].write_text("\n".join(map(json.dumps, pairs)))
    files[1].write_text(json.dumps(instructions))
    return files


def run(folder: Path) -> dict[str, str]:
    """All stages, in subfolders; returns the answer to each picture.

    Raises:
        RuntimeError: a command failed.
    """
    folder.mkdir(parents=True)
    write_llm(folder / "llm")
    pairs, instructions = write_data(folder)
    model = folder / "navil"
    expect(convert_checkpoint.main(["from-llm", str(folder / "llm"), str(model), "--vision-size", "2x64"]), "from-llm")
    for stage, steps in STEPS.items():
        output = folder / stage.replace(".", "")
        words = [stage, "--model", model, "--output", output, "--data", instructions if stage == "s2" else pairs]
        words += [*SETTINGS, "--steps", steps, *FASTER]
        expect(paper.main([str(word) for word in words]), stage)
        model = output
    expect(convert_checkpoint.main(["verify", str(model)]), "verify")
    network = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    settings = {"max_new_tokens": 8}
    return {color: network.chat(tokenizer, folder / f"{color}.png", QUESTION, settings) for color in COLORS}


def expect(exit_code: int, command: str) -> None:
    if exit_code:
        raise RuntimeError(f"{command} failed")


if __name__ == "__main__":
    for shown, answered in run(Path(sys.argv[1])).items():
        print(f"{shown} square: {QUESTION} {answered}")
