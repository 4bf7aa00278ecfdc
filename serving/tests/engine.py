"""vLLM's answers to the requests of cases.py; as a script, in a process of its own:

python serving/tests/engine.py FOLDER RESULT SETTINGS     # RESULT: a file of torch.save, SETTINGS: JSON of LLM
"""

import json
import sys
from pathlib import Path

import torch
from cases import conversations
from vllm import LLM, SamplingParams

NUM_NEW, NUM_LOGPROBS = 8, 10
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=NUM_LOGPROBS)


def start(folder: Path, **settings) -> LLM:
    defaults = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_num_seqs": 16, "max_model_len": 8192}
    return LLM(
        str(folder),
        trust_remote_code=True,
        limit_mm_per_prompt={"image": 4},
        **{**defaults, **settings},
    )


def ask(llm: LLM, chats: dict[str, list[dict]], sampling: SamplingParams = GREEDY, **options) -> dict[str, dict]:
    """All conversations at once: prompt ids, new ids, logprobs {id: logprob} of each, and number of cached tokens."""
    outputs = llm.chat(list(chats.values()), sampling, use_tqdm=False, **options)
    return {
        name: {
            "prompt_ids": list(output.prompt_token_ids),
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [{id: entry.logprob for id, entry in step.items()} for step in output.outputs[0].logprobs],
            "num_cached": output.num_cached_tokens,
        }
        for name, output in zip(chats, outputs, strict=True)
    }


def main() -> None:
    folder, result, settings = sys.argv[1:]
    llm = start(Path(folder), **json.loads(settings))
    torch.save(ask(llm, conversations()), result)


if __name__ == "__main__":
    main()
